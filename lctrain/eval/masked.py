"""masked_perplexity_by_length: how well a masked language model fills in tokens, by context."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lctrain.attention import is_patched
from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.distributed import ONE_RANK, Topology
from lctrain.eval.limits import check_model
from lctrain.eval.ratio import token_mean
from lctrain.eval.shared_work import owners, summed
from lctrain.eval.table import PerplexityRow, PerplexityTable
from lctrain.limits import check_lengths
from lctrain.loss import evaluation_mode, masked_losses

if TYPE_CHECKING:
    from lctrain.data import MaskTokens, TokenizedDocument


class _Masked(NamedTuple):
    """A document after masking: its tokens, and the tokens to predict, with -100 elsewhere."""

    tokens: np.ndarray
    labels: np.ndarray


def masked_perplexity_by_length(
    model: nn.Module,
    documents: Sequence[TokenizedDocument],
    lengths: Sequence[int],
    masking: MaskTokens,
    *,
    max_tokens: int,
    device: torch.device | str | None = None,
    progress: bool = False,
    name: str = "",
    ranks: Topology = ONE_RANK,
) -> PerplexityTable:
    """Measures the perplexity of masked tokens of held-out documents, by the context they are in.

    The same masked tokens are scored at every length. A document is cut into windows of `length`
    tokens, from its beginning; the model sees one window at a time, on both sides of a token.

    Args:
        model: A masked language model. If `lctrain.patch_model` has patched it, it reads packs of
            windows, otherwise one window at a time. Its training mode is restored.
        documents: Tokenized documents.
        lengths: Window lengths in tokens, each at least 2, in any order.
        masking: The choice of masked tokens; the same in every call.
        max_tokens: Largest number of tokens in a forward pass.
        device: Device of the model; None takes the device of its first parameter.
        progress: Whether to show a progress bar.
        name: Name of the model, for the title of the plot.
        ranks: Ranks that share the work, all of which call this function.

    Returns:
        A table with a row per length, whose `mean_context` is the mean number of other tokens in a
        scored token's window.

    Raises:
        ValueError: if a length is out of range, no token is masked, or the model does not support
            the tokens or lengths.
    """
    lengths = check_lengths(lengths, max_tokens)
    masked = [_mask(document.input_ids, masking) for document in documents]
    masked = [one for one in masked if (one.labels != IGNORE_INDEX).any()]
    if not masked:
        raise ValueError(
            f"documents must hold a masked token, got none in {len(documents)} of them. Hold out "
            "more text, or raise mask_fraction."
        )
    longest = max(len(one.tokens) for one in masked)
    check_model(model, [one.tokens for one in masked], min(lengths[-1], longest))
    device = next(model.parameters()).device if device is None else torch.device(device)
    counts = np.array([(one.labels != IGNORE_INDEX).sum() for one in masked])
    sums = {length: np.zeros(len(masked)) for length in lengths}
    numbers = {length: np.zeros(2) for length in lengths}  # other tokens that were seen; windows
    owner = owners([len(one.tokens) for one in masked], ranks.data_size)
    total = sum(len(one.tokens) for one in masked) * len(lengths)
    with (
        evaluation_mode(model),
        tqdm(total=total, desc="Masked tokens", unit="token", disable=not progress) as bar,
    ):
        for length in lengths:
            largest = max_tokens if is_patched(model) else 1
            groups = [
                list(_groups(masked, length, largest, np.flatnonzero(owner == rank)))
                for rank in range(ranks.data_size)
            ]
            mine = groups[ranks.data_rank]
            for group in mine:
                for document, window, losses in _score(model, masked, group, device):
                    sums[length][document] += losses.sum()
                    seen = window.stop - window.start
                    numbers[length] += (len(losses) * (seen - 1), 1)
                    bar.update(seen * ranks.data_size)  # of all ranks, about
            if ranks.is_sharded:  # all ranks call the layers equally often
                for _ in range(max(map(len, groups)) - len(mine)):
                    list(_score(model, masked, max(groups, key=len)[0], device))
            sums[length] = summed(sums[length], ranks)
            numbers[length] = summed(numbers[length], ranks)
    rows = []
    for length in lengths:
        loss, stderr = token_mean(sums[length], counts)
        gain, gain_stderr = token_mean(sums[lengths[0]] - sums[length], counts)
        with np.errstate(over="ignore"):
            perplexity, low, high = np.exp([loss, loss - stderr, loss + stderr]).tolist()
        rows.append(
            PerplexityRow(
                length=length,
                perplexity=perplexity,
                perplexity_low=low,
                perplexity_high=high,
                loss=loss,
                stderr=stderr,
                gain=gain,
                gain_stderr=gain_stderr,
                mean_context=float(numbers[length][0]) / int(counts.sum()),
                documents=len(masked),
                tokens=int(counts.sum()),
                windows=int(numbers[length][1]),
            )
        )
    return PerplexityTable(tuple(rows), name=name, overlap=0.0, min_context=0)


_Piece = tuple[int, slice]


def _mask(input_ids: np.ndarray, masking: MaskTokens) -> _Masked:
    batch = masking(PackedBatch.from_documents([np.asarray(input_ids, dtype=np.int64)]))
    return _Masked(batch.input_ids[0].numpy(), batch.labels[0].numpy())


def _groups(
    masked: Sequence[_Masked], length: int, max_tokens: int, chosen: Iterable[int]
) -> Iterator[list[_Piece]]:
    """Yields the windows of chosen documents in groups: one, or at most `max_tokens` tokens."""
    group: list[_Piece] = []
    held = 0
    for number in chosen:
        one = masked[number]
        for start in range(0, len(one.tokens), length):
            stop = min(start + length, len(one.tokens))
            if group and held + stop - start > max_tokens:
                yield group
                group, held = [], 0
            group.append((number, slice(start, stop)))
            held += stop - start
    if group:
        yield group


def _score(
    model: nn.Module, masked: Sequence[_Masked], group: Sequence[_Piece], device: torch.device
) -> Iterator[tuple[int, slice, np.ndarray]]:
    """Yields (document, window, losses of its masked tokens) for the windows of one group."""
    tokens = [masked[number].tokens[window] for number, window in group]
    labels = torch.from_numpy(np.concatenate([masked[n].labels[w] for n, w in group]))
    positions = (labels != IGNORE_INDEX).nonzero().flatten()
    if is_patched(model):
        inputs = PackedBatch.from_documents(tokens).to(device).model_kwargs()
    else:
        inputs = {"input_ids": torch.from_numpy(tokens[0])[None].to(device)}
    found = masked_losses(model, inputs, positions.to(device), labels[positions].to(device))
    counts = [int((masked[n].labels[w] != IGNORE_INDEX).sum()) for n, w in group]
    for (number, window), losses in zip(group, found.double().cpu().split(counts), strict=True):
        yield number, window, losses.numpy()
