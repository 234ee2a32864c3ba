"""Schedule: which requests run, and which pages they have.

A request is admitted as soon as pages for its tokens are free, without a reservation for its
completion. If a step finds no free page, the request that was admitted last gives its pages up. It
waits as the first in the queue, and its tokens so far are prefilled again. The request that was
admitted first always goes on, and the cache holds every request alone: so all of them end.

Where keys and values depend on the length of the request when they were stored, a second prefill
would give others. Requests then reserve all pages that they may need, and none gives its pages up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lctrain.generation.pages import PAGE, PagePool, pages_of
from lctrain.generation.prefixes import PrefixPages
from lctrain.generation.request import Request


class Schedule:
    """Admits, forks, preempts and retires requests.

    Args:
        requests: All requests; those of a group follow one another.
        pool: Pages.
        slots: Most requests that run together.
        width: Most pages of a request.

    Attributes:
        waiting: Requests without pages, in the order of their admission.
        running: Requests with pages, in the order in which they were admitted.
        preempted: Number of times that a request gave its pages up.
        forked: Number of requests that took over the pages of another one's prompt.
        shared: Number of pages that requests took over from the beginning of another prompt.
        version: Number of times that a request began or ceased to run.
    """

    def __init__(self, requests: Iterable[Request], pool: PagePool, slots: int, width: int) -> None:
        self.waiting = deque(requests)
        self.running: list[Request] = []
        self.preempted = self.forked = self.shared = self.version = 0
        window = pool.shape.window
        self._reserves = window is not None and any(
            request.longest > window for request in self.waiting
        )
        self._prefixes = PrefixPages(window)
        self._parted: list[int] = []  # pages of retired requests, which the next one may begin with
        self._pool = pool
        self._slots = list(range(slots - 1, -1, -1))
        self._tables = torch.zeros(slots, width, dtype=torch.int32)
        self._rows, self._rows_version = torch.empty(0, dtype=torch.int64), 0
        self._refused = -1  # version at which `admit` found no room for the next request

    def admit(self) -> list[list[Request]]:
        """Starts as many waiting requests as slots and pages suffice for.

        Running requests only take free pages until one begins or ceases to run. So a request that
        found no room is not looked at again before, which would cost a step the time to compare
        its prompt with all pages.

        Returns:
            Groups of requests with equal tokens. The first of a group is to be prefilled, from the
            token `known` on; the others share its pages.
        """
        if self._refused == self.version:
            return []
        groups = []
        held = []
        if self._parted:
            held = self._pool.share(self._prefixes.find(self.waiting[0].tokens))
            self._let_go(self._parted)
            self._parted = []
        while self.waiting and self._slots:
            tokens = self.waiting[0].tokens
            known = self._prefixes.find(tokens)
            need = pages_of(len(tokens)) - len(known)
            later = self._reserved(self.waiting[0], pages_of(len(tokens)))
            if self._pool.free < need + later + self._needed_soon():
                break
            leader = self.waiting.popleft()
            leader.known = len(known) * PAGE
            self._start(leader, self._pool.share(known) + self._pool.take(need))
            self._prefixes.add(tokens, leader.pages)
            self.shared += len(known)
            group = [leader]
            while self._slots and self._is_fork(leader):
                if self._pool.free <= later + self._needed_soon():
                    break
                fork = self.waiting.popleft()
                self._start(fork, self._pool.share(leader.pages))
                group.append(fork)
            self.forked += len(group) - 1
            groups.append(group)
        self._let_go(held)
        if not held:
            self._refused = self.version
        return groups

    def make_room(self, settle: Callable[[], bool]) -> None:
        """Gives every running request a page of its own for its next token.

        Args:
            settle: Reads all tokens of earlier steps, and retires requests that have ended. It is
                called before a request gives its pages up. Returns whether there were any.
        """
        for request in list(self.running):
            while request.stored >= request.owned and request.slot >= 0:
                if self._extend(request):
                    break
                if not settle():
                    self._preempt(self.running[-1])
                self._let_go(self._parted)
                self._parted = []

    def tables(self) -> Tensor:
        """Returns the pages of the running requests in their order, [n, width] int32."""
        if self._rows_version != self.version:
            self._rows = torch.tensor([request.slot for request in self.running])
            self._rows_version = self.version
        return self._tables.index_select(0, self._rows)

    def retire(self, request: Request) -> None:
        """Frees the slot of a running request, and its pages.

        While others wait, its pages are free in the next call of `admit` or `make_room`: requests
        that end together would else take the beginning with them that those who wait share.
        """
        self.version += 1
        self.running.remove(request)
        if self.waiting:
            self._parted += request.pages
        else:
            self._let_go(request.pages)
        self._slots.append(request.slot)
        request.pages, request.stored, request.owned, request.slot = [], 0, 0, -1

    def _let_go(self, pages: list[int]) -> None:
        self._prefixes.forget(self._pool.release(pages))

    def _needed_soon(self) -> int:
        """Returns the pages that the running requests need before they end, at most one each.

        If requests reserve pages, these are all that they may need.
        """
        growing = written = 0
        last = set()
        for request in self.running:
            more = pages_of(request.longest) - len(request.pages)
            growing += more if self._reserves else min(more, 1)
            if request.stored % PAGE and self._pool.is_shared(request.pages[-1]):
                last.add(request.pages[-1])
                written += 1
        return growing + written - len(last)

    def _reserved(self, request: Request, pages: int) -> int:
        """Returns the pages that a request reserves beyond those that it begins with."""
        return pages_of(request.longest) - pages if self._reserves else 0

    def _is_fork(self, leader: Request) -> bool:
        if leader.token_ids or not self.waiting:
            return False
        return self.waiting[0].group == leader.group and not self.waiting[0].token_ids

    def _start(self, request: Request, pages: list[int]) -> None:
        self.version += 1
        request.pages, request.slot = pages, self._slots.pop()
        request.stored = len(request.tokens)
        self._tables[request.slot, : len(pages)] = torch.tensor(pages)
        self.running.append(request)

    def _extend(self, request: Request) -> bool:
        """Gives a request a page that its next token is written to; False if none is free."""
        place, pages = request.stored // PAGE, request.pages
        if place == len(pages) or self._pool.is_shared(pages[place]):
            if not self._pool.free:
                return False
            if place < len(pages):
                pages[place] = self._pool.own(pages[place])
            else:
                pages += self._pool.take(1)
            self._tables[request.slot, place] = pages[place]
        # Others share full pages only, or begin together with the request: the page stays its own.
        request.owned = (place + 1) * PAGE
        return True

    def _preempt(self, request: Request) -> None:
        self.retire(request)
        self.waiting.appendleft(request)
        self.preempted += 1
