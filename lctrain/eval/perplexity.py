"""Perplexity by context length: how much a model gains from more context, on the same tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lctrain.batch import MIN_TOKENS
from lctrain.eval.begin import NO_BEGIN, BeginTokens
from lctrain.eval.extension import Extension
from lctrain.eval.limits import check_model
from lctrain.eval.ratio import token_mean
from lctrain.eval.runner import score_windows
from lctrain.eval.table import PerplexityRow, PerplexityTable
from lctrain.eval.windows import Windows, cut_windows
from lctrain.limits import check_lengths, check_windows

if TYPE_CHECKING:
    from lctrain.data import TokenizedDocument


def perplexity_by_length(
    model: nn.Module,
    documents: Sequence[TokenizedDocument],
    lengths: Sequence[int],
    *,
    max_tokens: int,
    device: torch.device | str | None = None,
    overlap: float = 0.5,
    stride: int | None = None,
    min_context: int = 1,
    extension: Extension | None = None,
    begin: BeginTokens = NO_BEGIN,
    progress: bool = False,
    name: str = "",
) -> PerplexityTable:
    """Measures the perplexity of held-out documents with contexts of different lengths.

    At every length the same tokens are scored, each once: all tokens of every document but its
    first `min_context`. What changes is how much of its document a token sees. Documents are cut
    into windows of at most `length` tokens that overlap (see `cut_windows`): a token sees more than
    `overlap * length` and at most `length` tokens before it, or, where its document begins less far
    back, all of them. So documents that are shorter than a length are not left out; they are
    scored with all the context that they have, and `mean_context` says how much that is. To look
    only at tokens for which every length is filled, set `min_context` to the longest one.

    No window crosses a document. With begin tokens every window begins with them, and so does every
    document; without, special tokens are tokens of their document, and where a tokenizer puts a
    begin token first, only the first window of a document has it. The mean is over tokens,
    and its standard error over documents (see `token_mean`).

    Args:
        model: a causal LM; packs are used where `lctrain.patch_model` has patched it (see
            `score_windows`). Its training mode is restored. Precision is the model's dtype,
            or that of the caller's torch.autocast.
        documents: tokenized documents; those of up to `min_context` tokens are not scored.
        lengths: context lengths in tokens, each at least 2; sorted, without duplicates.
        max_tokens: most tokens in a forward pass.
        device: device of the model; default: that of its first parameter.
        overlap: fraction of a window that is only context, in [0, 1). With 0.5 each token runs
            through the model twice; larger values give every token more context, and take longer.
        stride: positions that each window but the first of a document scores, at every length
            the same number; None for `(1 - overlap) * length`. It must be at most the shortest
            length.
        min_context: score tokens that have at least this many predecessors. Above the longest
            length minus `stride`, every scored token sees more than `length - stride` tokens at
            every length: then a length of n means that positions up to n are read.
        extension: how the model is fitted to each length; None leaves it as it is. Its attention
            must be in place: see `Extension.patched`.
        begin: what windows begin with: see `begin_tokens`. They count as tokens of a window.
        progress: show a progress bar.
        name: name of the model, for the title of the plot.

    Returns:
        A table, one row per length; `str(table)` is readable, `table.save(folder)` writes files.

    Raises:
        ValueError: if a length or option is out of range, nothing can be scored, or the model
            cannot take these tokens or lengths.
    """
    lengths = check_lengths(lengths, max_tokens)
    check_windows(overlap, min_context, stride, lengths[0])
    prefix = begin.tokens if begin.every_window else ()
    if lengths[0] < len(prefix) + MIN_TOKENS:
        raise ValueError(
            f"lengths must be at least {len(prefix) + MIN_TOKENS} with {len(prefix)} begin tokens, "
            f"got {lengths[0]}. Leave it out, or set begin_token=false."
        )
    tokens, counts = _scorable(documents, min_context, prefix)
    sizes = [len(ids) for ids in tokens]
    longest = max(sizes) - 1
    check_model(model, tokens, min(lengths[-1], longest))
    device = next(model.parameters()).device if device is None else torch.device(device)

    # All lengths beyond the longest document are alike: one run serves them.
    runs = {length: min(length, longest) if extension is None else length for length in lengths}
    distinct = sorted(set(runs.values()))
    windows = {
        length: cut_windows(
            sizes,
            length,
            overlap=overlap,
            stride=stride,
            min_context=min_context,
            begin=len(prefix),
        )
        for length in distinct
    }
    sums = {length: np.zeros(len(tokens)) for length in distinct}
    total = int(counts.sum()) * len(distinct)
    with tqdm(total=total, desc="Perplexity", unit="token", disable=not progress) as bar:
        for length in distinct:
            fitted = nullcontext() if extension is None else extension.at(model, length)
            with fitted:
                for scored in score_windows(
                    model,
                    tokens,
                    windows[length],
                    max_tokens=max_tokens,
                    device=device,
                    segment=None if extension is None else extension.segment,
                    begin=prefix,
                ):
                    sums[length] += np.bincount(scored.documents, scored.losses, len(tokens))
                    bar.update(len(scored.losses))
    shortest = sums[distinct[0]]
    rows = tuple(
        dataclasses.replace(
            _row(length, sums[run], shortest, counts, windows[run]),
            windows=len(windows[run]),
            begun=_count_begun(tokens, windows[run], begin.tokens),
        )
        for length, run in runs.items()
    )
    return PerplexityTable(
        rows,
        name=name,
        overlap=overlap,
        min_context=min_context,
        stride=stride,
        begin_tokens=begin.tokens,
    )


def longest_documents(
    documents: Sequence[TokenizedDocument], count: int | None, tokens: int | None = None
) -> list[TokenizedDocument]:
    """Returns the longest documents, the longest first; of equal ones the earlier first.

    Args:
        documents: Tokenized documents.
        count: Most documents; None for all.
        tokens: Tokens of each document, from its beginning; None for all.

    Raises:
        ValueError: if `count` is below 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"documents must be at least 1, got {count}. Use null for all of them.")
    longest = sorted(documents, key=lambda document: -len(document.input_ids))[:count]
    return [dataclasses.replace(one, input_ids=one.input_ids[:tokens]) for one in longest]


def _scorable(
    documents: Sequence[TokenizedDocument], min_context: int, begin: Sequence[int]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns token ids of the documents with scored tokens, and the number of scored tokens each.

    Every document begins with `begin`: those that do not get it.
    """
    tokens = [np.asarray(document.input_ids, dtype=np.int64) for document in documents]
    prefix = np.array(begin, dtype=np.int64)
    tokens = [ids if _begins(ids, begin) else np.concatenate([prefix, ids]) for ids in tokens]
    kept = [ids for ids in tokens if len(ids) > min_context]
    if not kept:
        longest = f", the longest of {max(map(len, tokens))} tokens" if tokens else ""
        raise ValueError(
            f"documents must hold one of more than {min_context} tokens, got {len(tokens)}{longest}"
            ". Hold out more or longer documents, or lower min_context."
        )
    return kept, np.array([len(ids) - min_context for ids in kept], dtype=np.int64)


def _begins(ids: np.ndarray, begin: Sequence[int]) -> bool:
    return ids[: len(begin)].tolist() == list(begin)


def _count_begun(tokens: Sequence[np.ndarray], windows: Windows, begin: Sequence[int]) -> int:
    """The number of windows that begin with the begin tokens."""
    if not begin:
        return 0
    whole = np.array([_begins(ids, begin) for ids in tokens])[windows.documents]
    return int(((windows.prefixes > 0) | (whole & (windows.starts == 0))).sum())


def _row(
    length: int, sums: np.ndarray, shortest: np.ndarray, counts: np.ndarray, windows: Windows
) -> PerplexityRow:
    loss, stderr = token_mean(sums, counts)
    gain, gain_stderr = token_mean(shortest - sums, counts)
    with np.errstate(over="ignore"):
        perplexity, low, high = np.exp([loss, loss - stderr, loss + stderr]).tolist()
    return PerplexityRow(
        length=length,
        perplexity=perplexity,
        perplexity_low=low,
        perplexity_high=high,
        loss=loss,
        stderr=stderr,
        gain=gain,
        gain_stderr=gain_stderr,
        mean_context=windows.mean_context(),
        documents=len(counts),
        tokens=int(counts.sum()),
    )
