"""perplexity_by_length: perplexity of the same tokens with contexts of different lengths."""

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
from lctrain.pluralize import pluralize

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
    progress: bool | str = False,
    name: str = "",
) -> PerplexityTable:
    """Measures the perplexity of held-out documents with contexts of different lengths.

    At every length the same tokens are scored, each once: all tokens of a document except its first
    `min_context`. Only the length of their context differs. Documents are cut into overlapping
    windows of at most `length` tokens (see `cut_windows`). A token is predicted from more than
    `overlap * length` and at most `length` preceding tokens, or from all preceding tokens of its
    document if there are fewer. Documents shorter than a length are therefore scored too, and the
    column `mean_context` holds the mean number of tokens seen. To score only tokens whose document
    is long enough for every length, set `min_context` to the longest length.

    A window never crosses a document boundary. If begin tokens are given, every document and every
    window begins with them. Otherwise special tokens are part of their document, so only its first
    window has the begin token. The loss is a mean over tokens, and its standard error is taken over
    documents (see `token_mean`).

    Args:
        model: A causal LM. If `lctrain.patch_model` has patched it, it reads packs (see
            `score_windows`). Its training mode is restored. It runs in its own dtype, or in the
            caller's torch.autocast.
        documents: Tokenized documents. Those of at most `min_context` tokens are not scored.
        lengths: Context lengths in tokens, each at least 2, in any order.
        max_tokens: Largest number of tokens in a forward pass.
        device: Device of the model; None takes the device of its first parameter.
        overlap: Fraction of a window that is context and not scored, in [0, 1). With 0.5 the model
            computes each token twice; a larger value gives tokens more context and takes longer.
        stride: Number of positions that each window of a document after the first scores, the same
            at every length and at most the shortest length; None for `(1 - overlap) * length`.
        min_context: Smallest number of preceding tokens of a scored token. If it is above the
            longest length minus `stride`, every scored token sees more than `length - stride`
            tokens at every length.
        extension: Method of reading beyond the window, which scales the model for each length. The
            model must be patched with its attention: see `Extension.patched`. None scales nothing.
        begin: Begin tokens of the windows: see `begin_tokens`. They count as tokens of a window.
        progress: Whether to show a progress bar; a text is the bar's title.
        name: Name of the model, for the title of the plot.

    Returns:
        A table with a row per length. `str(table)` is the table in text, and `table.save(folder)`
        writes files.

    Raises:
        ValueError: if a length or option is out of range, no token can be scored, or the model does
            not support the tokens or lengths.
    """
    lengths = check_lengths(lengths, max_tokens)
    check_windows(overlap, min_context, stride, lengths[0])
    prefix = begin.tokens if begin.every_window else ()
    if lengths[0] < len(prefix) + MIN_TOKENS:
        raise ValueError(
            f"lengths must be at least {len(prefix) + MIN_TOKENS} with "
            f"{pluralize(len(prefix), 'begin token')}, "
            f"got {lengths[0]}. Leave it out, or set begin_token=false."
        )
    tokens, counts = _scorable(documents, min_context, prefix)
    sizes = [len(ids) for ids in tokens]
    longest = max(sizes) - 1
    check_model(model, tokens, min(lengths[-1], longest))
    device = next(model.parameters()).device if device is None else torch.device(device)

    # All lengths beyond the longest document give the same windows, so they are run once.
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
    label = f"Perplexity, {progress}" if isinstance(progress, str) else "Perplexity"
    with tqdm(total=total, desc=label, unit="token", disable=not progress) as bar:
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
    """Returns the longest documents, longest first. Documents of equal length keep their order.

    Args:
        documents: Tokenized documents.
        count: Largest number of documents; None for all.
        tokens: Number of tokens to keep of each document, from its beginning; None for all.

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
    """Returns the documents that have tokens to score, and the number of scored tokens in each.

    Args:
        documents: Tokenized documents.
        min_context: Smallest number of preceding tokens of a scored token.
        begin: Begin tokens, which are added to documents that do not begin with them.

    Returns:
        Token ids of each kept document, [n] int64, and the counts, [documents] int64.
    """
    tokens = [np.asarray(document.input_ids, dtype=np.int64) for document in documents]
    prefix = np.array(begin, dtype=np.int64)
    tokens = [ids if _begins(ids, begin) else np.concatenate([prefix, ids]) for ids in tokens]
    kept = [ids for ids in tokens if len(ids) > min_context]
    if not kept:
        longest = f", the longest of {pluralize(max(map(len, tokens)), 'token')}" if tokens else ""
        raise ValueError(
            f"documents must hold one of more than {pluralize(min_context, 'token')}, got "
            f"{len(tokens)}{longest}"
            ". Hold out more or longer documents, or lower min_context."
        )
    return kept, np.array([len(ids) - min_context for ids in kept], dtype=np.int64)


def _begins(ids: np.ndarray, begin: Sequence[int]) -> bool:
    return ids[: len(begin)].tolist() == list(begin)


def _count_begun(tokens: Sequence[np.ndarray], windows: Windows, begin: Sequence[int]) -> int:
    """Returns the number of windows that begin with the begin tokens."""
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
