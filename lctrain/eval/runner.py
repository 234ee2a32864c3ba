"""Runs windows of documents through a model and gives back the loss of each scored token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lctrain.attention import is_patched
from lctrain.batch import PackedBatch
from lctrain.data.packing import pack
from lctrain.eval.windows import Windows
from lctrain.loss import evaluation_mode, token_losses


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    """Scored positions of some windows, n of them.

    Attributes:
        documents: [n] int64, index of the document.
        positions: [n] int64, place in the document; the token after it was predicted.
        losses: [n] float64, negative log-likelihoods in nats.
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
) -> Iterator[ScoredTokens]:
    """Scores windows batch by batch, each batch of at most `max_tokens` tokens.

    A model with one of lctrain's attentions gets packs without padding. Any other model gets rows
    that are padded on the right: it is causal, so nothing real sees the padding, and unlike a
    pack this leaks between documents in no architecture. Only scored tokens meet the vocabulary.

    Args:
        model: causal LM; it is in evaluation mode while a batch runs, and left as it was.
        documents: token ids of each document, [n] integers.
        windows: what to score; none is longer than `max_tokens`.
        max_tokens: most tokens in a batch.
        device: where the model is.

    Yields:
        The scored tokens of one batch; all batches together hold every scored position once.
    """
    packed = is_patched(model)
    batches = _packs(windows, max_tokens) if packed else _rows(windows, max_tokens)
    for batch in batches:
        parts = [
            documents[windows.documents[w]][windows.starts[w] : windows.stops[w]] for w in batch
        ]
        width = 0 if packed else max(map(len, parts))
        kwargs = _packed_kwargs(parts, device) if packed else _row_kwargs(parts, width, device)
        # where each window begins in the flattened tokens of the batch
        lengths = [len(part) for part in parts]
        offsets = np.arange(len(parts)) * width if width else np.cumsum([0, *lengths[:-1]])
        chosen = [np.arange(windows.scored_from[w], windows.stops[w]) for w in batch]
        places = [
            offset + positions - windows.starts[w]
            for offset, positions, w in zip(offsets, chosen, batch, strict=True)
        ]
        targets = [
            documents[windows.documents[w]][positions + 1]
            for positions, w in zip(chosen, batch, strict=True)
        ]
        with evaluation_mode(model):
            losses = token_losses(model, kwargs, _to(places, device), _to(targets, device))
        yield ScoredTokens(
            documents=np.repeat(windows.documents[batch], windows.scored[batch]),
            positions=np.concatenate(chosen),
            losses=losses.double().cpu().numpy(),
        )


def _packs(windows: Windows, max_tokens: int) -> Iterator[np.ndarray]:
    plan = pack(windows.lengths, max_tokens)
    for row in range(len(plan)):
        yield plan.row(row)


def _rows(windows: Windows, max_tokens: int) -> Iterator[np.ndarray]:
    """Windows of similar length together, the longest first, so that little is padding."""
    order = np.argsort(-windows.lengths, kind="stable")
    begin = 0
    while begin < len(order):
        rows = max_tokens // int(windows.lengths[order[begin]])
        yield order[begin : begin + rows]
        begin += rows


def _packed_kwargs(parts: list[np.ndarray], device: torch.device) -> dict[str, Any]:
    return PackedBatch.from_documents(parts).to(device).model_kwargs()


def _row_kwargs(parts: list[np.ndarray], width: int, device: torch.device) -> dict[str, Any]:
    rows = np.zeros((len(parts), width), dtype=np.int64)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    return {"input_ids": torch.from_numpy(rows).to(device), "use_cache": False}


def _to(parts: list[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)
