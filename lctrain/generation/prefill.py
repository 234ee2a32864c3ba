"""prefill: stores the keys and values of prompts, in packs without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lctrain.attention.cache_step import StepAttention
from lctrain.generation.forward import CachedForward
from lctrain.generation.pages import PagePool, slots_of
from lctrain.transfer import upload

Prompt = tuple[Sequence[int], Sequence[int], int]
"""Tokens and pages of a request, and the number of tokens whose keys its pages hold already."""


class Piece(NamedTuple):
    """Consecutive tokens of a request.

    Attributes:
        tokens: All tokens of the request to be stored.
        pages: Pages of the request.
        begin: Index of the first token of the piece.
        end: Index after its last token.
    """

    tokens: Sequence[int]
    pages: Sequence[int]
    begin: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether the piece holds the last token of the request."""
        return self.end == len(self.tokens)


class PrefillStep:
    """The CacheStep of a pack: writes keys and values to pages, and attends within requests.

    Args:
        pool: Pages.
        pieces: Pieces of the pack.
        device: Device of the pages.
    """

    def __init__(self, pool: PagePool, pieces: Sequence[Piece], device: torch.device) -> None:
        from lctrain_kernels.pack import checked_pack

        self._pool = pool
        self._pieces = pieces
        self._device = device
        slots = [slots_of(piece.pages, piece.begin, piece.end) for piece in pieces]
        self._slots = upload(torch.cat(slots), device)
        self._keys: Tensor | None = None  # None: all keys are those of the pack
        lengths = queries = [piece.end - piece.begin for piece in pieces]
        if any(piece.begin for piece in pieces):
            stored = [slots_of(piece.pages, 0, piece.end) for piece in pieces]
            self._keys = upload(torch.cat(stored), device)
            lengths = [piece.end for piece in pieces]
        begins = upload(boundaries(queries), device)
        self._pack = checked_pack(
            begins,
            begins if self._keys is None else upload(boundaries(lengths), device),
            sum(queries),
            sum(lengths),
            device,
            max_seqlen_q=max(queries),
            max_seqlen_k=max(lengths),
        )

    @property
    def lengths(self) -> Tensor:
        """Tokens of each request, those of its later pieces too, [N] int64."""
        return upload(torch.tensor([len(piece.tokens) for piece in self._pieces]), self._device)

    def attend(
        self,
        module: nn.Module,
        states: tuple[Tensor, Tensor, Tensor],
        attention: StepAttention,
        arguments: dict[str, Any],
    ) -> Tensor:
        """Returns the output of a layer, [1, T, H', W]; see CacheStep."""
        stores = [pages.flatten(0, 1) for pages in self._pool.layer(int(module.layer_idx))]  # type: ignore[arg-type]
        q, k, v = (x[0].transpose(0, 1).to(stores[0].dtype) for x in states)
        for store, new in zip(stores, (k, v), strict=True):
            store.index_copy_(0, self._slots, new)
        if self._keys is not None:
            k, v = (store.index_select(0, self._keys) for store in stores)
        return attention.packed(q, k, v, self._pack)[None]


def prefill(
    forward: CachedForward,
    pool: PagePool,
    requests: Sequence[Prompt],
    most: int,
) -> Tensor:
    """Stores the tokens of requests, and returns the logits after each request's last token.

    Args:
        forward: The model.
        pool: Pages.
        requests: What to store. Tokens that are known come from an earlier request.
        most: Most tokens of a pack. Longer prompts are cut, and each piece attends to those before.

    Returns:
        [requests, V].
    """
    found = []
    for pieces in packs(requests, most):
        tokens = [np.array(piece.tokens[piece.begin : piece.end]) for piece in pieces]
        ids = upload(torch.from_numpy(np.concatenate(tokens)[None]), forward.device)
        places = [torch.arange(piece.begin, piece.end) for piece in pieces]
        positions = upload(torch.cat(places)[None], forward.device)
        ends = boundaries([piece.end - piece.begin for piece in pieces])[1:].long() - 1
        keep = upload(ends[[piece.is_last for piece in pieces]], forward.device)
        step = PrefillStep(pool, pieces, forward.device)
        logits = forward(ids, positions, step, keep)
        found.append(logits)
    return torch.cat(found)


def packs(requests: Sequence[Prompt], most: int) -> Iterator[list[Piece]]:
    """Yields the pieces of each pack, in the order of the requests.

    A request that fits into one pack is not cut, so its attention is that of a training forward.

    Args:
        requests: What to store.
        most: Most tokens of a pack.
    """
    pieces: list[Piece] = []
    room = most
    for tokens, pages, begin in requests:
        if len(tokens) - begin > room and pieces:
            yield pieces
            pieces, room = [], most
        while len(tokens) - begin > most:
            yield [Piece(tokens, pages, begin, begin + most)]
            begin += most
        pieces.append(Piece(tokens, pages, begin, len(tokens)))
        room -= len(tokens) - begin
    if pieces:
        yield pieces


def boundaries(lengths: Sequence[int]) -> Tensor:
    """Returns the cumulative lengths from 0, [N + 1] int32."""
    return torch.tensor([0, *lengths]).cumsum(0).int()
