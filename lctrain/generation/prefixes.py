"""PrefixPages: finds pages in use that hold the first tokens of a request."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from lctrain.generation.pages import PAGE


class PrefixPages:
    """Remembers which page holds which tokens of a prompt, behind which page.

    The keys and values of a token depend on all tokens before it. So a page is known by its tokens
    and by the page before it; a request that uses a page uses all pages before it, too. Only full
    pages are remembered, to which nothing is written.

    Args:
        window: Tokens of a request from which on its keys and values depend on its length, so that
            only requests of one length share pages; None if they never do.
    """

    def __init__(self, window: int | None = None) -> None:
        self._window = window
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Returns the pages that hold the first tokens; at least one token is left over.

        Args:
            tokens: Token ids of a request.
        """
        found: list[int] = []
        for place in range((len(tokens) - 1) // PAGE):
            page = self._pages.get(self._key(tokens, place, found))
            if page is None:
                break
            found.append(page)
        return found

    def add(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Remembers the full pages of a request.

        Args:
            tokens: Token ids of the request.
            pages: Its pages.
        """
        for place in range(len(tokens) // PAGE):
            key = self._key(tokens, place, pages)
            if pages[place] not in self._keys and key not in self._pages:
                self._pages[key] = pages[place]
                self._keys[pages[place]] = key

    def forget(self, pages: Iterable[int]) -> None:
        """Forgets pages that have no user any more."""
        for page in pages:
            key = self._keys.pop(page, None)
            if key is not None:
                del self._pages[key]

    def _key(self, tokens: Sequence[int], place: int, pages: Sequence[int]) -> bytes:
        """Returns the page before a place, and the tokens at the place.

        At the beginning, a negative number stands for the lengths whose pages are the same. Bytes,
        unlike thousands of tuples, give the garbage collector nothing to look through.
        """
        if place:
            before = pages[place - 1]
        else:
            before = -1 if self._window is None else -max(len(tokens), self._window)
        return array("q", [before, *tokens[place * PAGE : (place + 1) * PAGE]]).tobytes()
