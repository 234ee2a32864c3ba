"""HostStore: keeps tensors of the forward on the host until the backward needs them.

Copies run on a side stream beside the compute stream. In the forward, at most two tensors wait for
their copy. In the backward, the tensors of the layer before the current one are copied back while
the current layer computes. On a CPU the same code copies within the host's memory.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

from lctrain.memory.arena import Arena, Slot, aligned
from lctrain.warn import warn_caller

MOST_WAITING = 2


class OnDevice:
    """A tensor that stays where it is.

    Args:
        x: The tensor; what computed it is not kept.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x.detach()

    def get(self) -> Tensor:
        """Returns the tensor, without a gradient's history."""
        return self._x.detach()


class HostStore:
    """Keeps tensors on the host, each kind in arenas of its own.

    Attributes:
        stored_bytes: Bytes that are in the arenas now.
        left_on_device: Number of tensors that stayed on the device, because the host had no room.

    Args:
        counts: Number of tensors of a forward pass, by kind. The first tensor of a kind determines
            the size of the kind's arena.
        host_bytes: Most bytes of all arenas together; None for no limit.
        tokens: Number of tokens of the longest pack; None sizes arenas by the packs that come.
    """

    def __init__(
        self, counts: dict[str, int], host_bytes: int | None = None, tokens: int | None = None
    ) -> None:
        self.counts = counts
        self.host_bytes = host_bytes
        self.tokens = tokens
        self.left_on_device = 0
        self._arenas: dict[str, list[Arena]] = {}
        self._waiting: deque[tuple[Any, Tensor]] = deque()
        self._stream: Any = None
        self._last: weakref.ref[Group] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> HostStore:
        """Returns an empty store with the same settings, for a copy of the model."""
        return HostStore(self.counts, self.host_bytes, self.tokens)

    @property
    def stored_bytes(self) -> int:
        """Bytes that are in the arenas now."""
        return sum(arena.used for arenas in self._arenas.values() for arena in arenas)

    @property
    def capacity(self) -> int:
        """Bytes of all arenas."""
        return sum(arena.capacity for arenas in self._arenas.values() for arena in arenas)

    def group(self) -> Group:
        """Returns a new group, for the tensors of the next layer of the forward."""
        group = Group(self, self._last)
        self._last = weakref.ref(group)
        return group

    def put(self, x: Tensor, kind: str, group: Group, tokens: int) -> OnHost | OnDevice:
        """Starts the copy of a tensor to the host.

        Args:
            x: Tensor of any shape and strides.
            kind: A key of `counts`.
            group: Group of the layer.
            tokens: Number of tokens of the pack.

        Returns:
            The place from which to get the tensor back; the device, if the host has no room.
        """
        x = x.detach()
        like = torch.empty_like(x, device="meta")  # the strides of a dense copy of x
        size = like.numel() * like.element_size()
        longest = max(self.tokens or 0, tokens)
        slot = self._slot(size, kind, x.device, size * longest // max(tokens, 1))
        if slot is None:
            self.left_on_device += 1
            if self.left_on_device == 1:
                warn_caller(
                    "the host has no room for some tensors, which stay on the device. Raise "
                    "memory.host_gib, or shorten the packs."
                )
            return OnDevice(x)
        view = slot.view(like)
        self._copy(view, x)
        self._waiting.append((self._event(x), x))
        while len(self._waiting) > MOST_WAITING:
            self._finish_one()
        return OnHost(self, slot, view, x.device, group)

    def _slot(self, size: int, kind: str, device: torch.device, largest: int) -> Slot | None:
        """Returns a slot; None if the host has no room. A kind gets further arenas as needed."""
        arenas = self._arenas.setdefault(kind, [])
        for arena in arenas:
            if (slot := arena.reserve(size)) is not None:
                return slot
        self._drop_unused(arenas)  # they are too small
        needed = self.counts[kind] * aligned(largest)
        if self.host_bytes is not None:
            needed = min(needed, self.host_bytes - self.capacity)
        if needed < aligned(size):
            return None
        arenas.append(Arena(needed, device.type == "cuda", self._stream_of(device)))
        return arenas[-1].reserve(size)

    def _drop_unused(self, arenas: list[Arena]) -> None:
        """Removes arenas without slots, after the copies that may still read or write them."""
        used = [arena for arena in arenas if arena.used > 0]
        if len(used) < len(arenas) and self._stream is not None:
            self._stream.synchronize()
        arenas[:] = used

    def _stream_of(self, device: torch.device) -> Any:
        """Returns the side stream; None on a CPU."""
        if self._stream is None and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def side_stream(self, device: torch.device) -> Any:
        """Returns a context in which copies run beside the compute stream, after its work so far.

        On a CPU the context does nothing.
        """
        if device.type != "cuda":
            return contextlib.nullcontext()
        stream = self._stream_of(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        device = source.device if source.device.type == "cuda" else target.device
        with self.side_stream(device):
            target.copy_(source, non_blocking=True)

    def _event(self, x: Tensor) -> Any:
        return self._stream.record_event() if x.device.type == "cuda" else None

    def _finish_one(self) -> None:
        """Lets the compute stream wait for the oldest copy, and then lets go of its tensor."""
        event, x = self._waiting.popleft()
        if event is not None:
            torch.cuda.current_stream(x.device).wait_event(event)

    def advance(self) -> None:
        """Lets go of the oldest tensor that waits, when a layer has nothing for the host."""
        if self._waiting:
            self._finish_one()

    def finish(self) -> None:
        """Lets go of all tensors that wait for their copy."""
        while self._waiting:
            self._finish_one()


class Group:
    """The tensors of one layer in one forward pass. They come back together.

    Args:
        store: The store.
        previous: The group of the layer before, by a weak reference; None for the first layer.
    """

    def __init__(self, store: HostStore, previous: weakref.ref[Group] | None) -> None:
        self.store = store
        self.previous = previous
        self._members: list[weakref.ref[OnHost]] = []

    def add(self, member: OnHost) -> None:
        """Adds a tensor to the group."""
        self._members.append(weakref.ref(member))

    def fetch(self) -> None:
        """Starts copies to the device of all tensors of the group that are not there."""
        for reference in self._members:
            if (member := reference()) is not None:
                member.fetch()


class OnHost:
    """A tensor whose values are in a slot of the host.

    Args:
        store: The store.
        slot: The slot.
        view: The slot as a tensor.
        device: Device from which the tensor came.
        group: Group of the layer.
    """

    def __init__(
        self, store: HostStore, slot: Slot, view: Tensor, device: torch.device, group: Group
    ) -> None:
        self._store = store
        self._slot = slot
        self._view = view
        self._device = device
        self._group = group
        self._fetched: tuple[Tensor, Any] | None = None
        group.add(self)

    def fetch(self) -> None:
        """Starts the copy to the device, unless it has started."""
        if self._fetched is not None:
            return
        # Allocated on the compute stream, which is the one that uses and frees it.
        x = torch.empty_strided(
            self._view.shape, self._view.stride(), dtype=self._view.dtype, device=self._device
        )
        self._store._copy(x, self._view)
        self._fetched = x, self._store._event(x)

    def get(self) -> Tensor:
        """Returns the tensor on its device, and starts the copies of the layer before."""
        self._store.finish()
        if self._fetched is None:
            self._group.fetch()
        assert self._fetched is not None
        x, event = self._fetched
        self._fetched = None
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        before = None if self._group.previous is None else self._group.previous()
        if before is not None:
            before.fetch()
        return x

    def __del__(self) -> None:
        # A tensor that nobody got may still be written by the side stream.
        fetched = getattr(self, "_fetched", None)
        if fetched is not None and fetched[1] is not None:
            torch.cuda.current_stream(self._device).wait_event(fetched[1])
