"""score_windows: runs windows of documents through a model, and yields the loss of every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lctrain.attention import is_patched
from lctrain.batch import PackedBatch
from lctrain.data.packing import plan_rows
from lctrain.distributed import ONE_RANK, Topology
from lctrain.eval.shared_work import owners
from lctrain.eval.windows import Windows
from lctrain.instances import require_instance, require_int, require_sequence
from lctrain.loss import evaluation_mode, token_losses
from lctrain.models.frequencies import row_frequencies
from lctrain.transfer import HostCopy, upload


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    """Losses of n scored positions.

    Attributes:
        documents: [n] int64, index of the document of each position.
        positions: [n] int64, position in the document. Its loss is that of the next token.
        losses: [n] float64, negative log-likelihood of the next token, in nats.
    """

    documents: np.ndarray
    positions: np.ndarray
    losses: np.ndarray


def score_windows(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    windows: Windows,
    *,
    max_tokens: int,
    device: torch.device,
    segment: int | None = None,
    begin: Sequence[int] = (),
    ranks: Topology = ONE_RANK,
) -> Iterator[ScoredTokens]:
    """Scores windows in batches of at most `max_tokens` tokens.

    A model with one of lctrain's attentions reads packs without padding. Any other model reads rows
    that are padded on the right: a causal model does not see the padding, and documents in
    different rows stay separate in every architecture. If rotary frequencies depend on the length,
    each window gets those of its own length, so losses do not depend on the batch. Logits are
    computed for scored positions only.

    The next batch is queued on the device before the losses of a batch are awaited, so that the
    device has work meanwhile.

    Args:
        model: A causal LM. It is in evaluation mode while a batch runs, and unchanged afterwards.
        documents: Token ids of each document, [n] integers.
        windows: Windows to score, each of at most `max_tokens` tokens.
        max_tokens: Largest number of tokens in a batch.
        device: Device of the model.
        segment: Length in tokens of the parts into which windows are cut, without attention between
            parts; None for whole windows. Only packs can be cut. Parts after the first have no
            begin tokens.
        begin: Begin tokens, which are put before a window if its prefix is not 0.
        ranks: Ranks that share the documents; each scores the windows of some of them. All ranks
            must call this function, and run equally many batches: their parameters may be sharded.

    Yields:
        The scored positions of one batch. All batches of all data ranks together hold every scored
        position once.
    """
    require_instance("model", model, nn.Module, "Pass a causal LM of transformers.")
    require_sequence("documents", documents, "Pass the token ids of each document.")
    require_instance("windows", windows, Windows, "Call lctrain.eval.cut_windows.")
    require_int("max_tokens", max_tokens, 1, "Pass the tokens of a batch.")
    require_instance("device", device, torch.device, "Pass that of the model.")
    packed = is_patched(model)
    if segment is not None and not packed:
        raise ValueError(
            f"segment must be None for a model on padded rows, got {segment}. Patch its attention: "
            "lctrain.patch_model(model)."
        )
    planned = [
        _planned(windows, max_tokens, packed, rank, ranks) for rank in range(ranks.data_size)
    ]
    mine = planned[ranks.data_rank]
    # A rank without windows left reads the shortest one again, without scoring it.
    missing = max(map(len, planned)) - len(mine) if ranks.is_sharded else 0
    batches = [*mine, *([np.array([np.argmin(windows.lengths)])] * missing)]
    prefix = np.array(begin, dtype=np.int64)
    waiting: tuple[np.ndarray, np.ndarray, HostCopy] | None = None
    for number, batch in enumerate(batches):
        parts = [
            np.concatenate(
                [
                    prefix[: windows.prefixes[w]],
                    documents[windows.documents[w]][windows.starts[w] : windows.stops[w]],
                ]
            )
            for w in batch
        ]
        width = 0 if packed else max(map(len, parts))
        pieces = cut(parts, segment)
        kwargs = packed_kwargs(pieces, device) if packed else row_kwargs(parts, width, device)
        # where each window begins in the flattened tokens of the batch
        lengths = [len(part) for part in parts]
        offsets = np.arange(len(parts)) * width if width else np.cumsum([0, *lengths[:-1]])
        chosen = [np.arange(windows.scored_from[w], windows.stops[w]) for w in batch]
        places = [
            offset + windows.prefixes[w] + positions - windows.starts[w]
            for offset, positions, w in zip(offsets, chosen, batch, strict=True)
        ]
        targets = [
            documents[windows.documents[w]][positions + 1]
            for positions, w in zip(chosen, batch, strict=True)
        ]
        own = nullcontext() if packed else row_frequencies(model, torch.tensor(lengths))
        with evaluation_mode(model), own:
            losses = token_losses(model, kwargs, _to(places, device), _to(targets, device))
            copied = HostCopy(losses.double())
        if waiting is not None:
            yield ScoredTokens(waiting[0], waiting[1], waiting[2].wait().numpy())
            waiting = None
        if number < len(mine):
            numbers = np.repeat(windows.documents[batch], windows.scored[batch])
            waiting = numbers, np.concatenate(chosen), copied
    if waiting is not None:
        yield ScoredTokens(waiting[0], waiting[1], waiting[2].wait().numpy())


def _planned(
    windows: Windows, max_tokens: int, packed: bool, rank: int, ranks: Topology
) -> list[np.ndarray]:
    """Returns the batches of one data rank, each as indices of windows.

    A document's windows are all scored by one data rank.

    Args:
        windows: Windows of all documents.
        max_tokens: Largest number of tokens in a batch.
        packed: Whether the model reads packs.
        rank: Index of the data rank.
        ranks: Ranks of the run.
    """
    costs = np.bincount(windows.documents, windows.lengths).tolist()
    owner = owners(costs, ranks.data_size)
    mine = np.flatnonzero(owner[windows.documents] == rank)
    if not len(mine):
        return []
    cut_batches = _packs if packed else _rows
    return [mine[batch] for batch in cut_batches(windows.chosen(mine), max_tokens)]


def _packs(windows: Windows, max_tokens: int) -> Iterator[np.ndarray]:
    plan = plan_rows(windows.lengths, max_tokens)
    for row in range(len(plan)):
        yield plan.row(row)


def _rows(windows: Windows, max_tokens: int) -> Iterator[np.ndarray]:
    """Yields batches of windows of similar length, longest first, so that padding is short."""
    order = np.argsort(-windows.lengths, kind="stable")
    begin = 0
    while begin < len(order):
        rows = max_tokens // int(windows.lengths[order[begin]])
        yield order[begin : begin + rows]
        begin += rows


def cut(parts: Sequence[np.ndarray], segment: int | None) -> list[np.ndarray]:
    """Cuts token ids, [n] each, into pieces of at most `segment` tokens; None leaves them whole."""
    if segment is None:
        return list(parts)
    return [
        part[start : start + segment] for part in parts for start in range(0, len(part), segment)
    ]


def packed_kwargs(parts: Sequence[np.ndarray], device: torch.device) -> dict[str, Any]:
    """Returns the arguments of a forward pass over documents in one pack."""
    pack = PackedBatch.from_documents(parts)
    if device.type == "cuda":
        pack = pack.pin_memory()
    return pack.to(device, non_blocking=True).model_kwargs()


def row_kwargs(parts: Sequence[np.ndarray], width: int, device: torch.device) -> dict[str, Any]:
    """Returns the arguments of a forward pass over rows of `width` tokens, padded on the right."""
    rows = np.zeros((len(parts), width), dtype=np.int64)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    return {"input_ids": upload(torch.from_numpy(rows), device), "use_cache": False}


def _to(parts: list[np.ndarray], device: torch.device) -> Tensor:
    return upload(torch.from_numpy(np.concatenate(parts).astype(np.int64)), device)
