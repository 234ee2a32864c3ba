"""perplexity_by_length and compare_methods: perplexity of the same tokens by context length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lctrain.distributed import ONE_RANK, Topology
from lctrain.eval.begin import NO_BEGIN, BeginTokens
from lctrain.eval.comparison import MethodComparison
from lctrain.eval.extension import Extension
from lctrain.eval.reading import GivenReading
from lctrain.eval.records import Subject
from lctrain.eval.run_task import Run, computed
from lctrain.eval.table import PerplexityTable
from lctrain.eval.tasks.perplexity import Perplexity
from lctrain.limits import check_lengths

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
    ranks: Topology = ONE_RANK,
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
        progress: Whether to show a progress bar.
        name: Name of the model, for the title of the plot.
        ranks: Ranks that share the work, all of which call this function.

    Returns:
        A table with a row per length. `str(table)` is the table in text, and `table.save(folder)`
        writes files.

    Raises:
        ValueError: if a length or option is out of range, no token can be scored, or the model does
            not support the tokens or lengths.
    """
    lengths = check_lengths(lengths, max_tokens)
    task = Perplexity(overlap=overlap, stride=stride, min_context=min_context, begin=begin)
    reading = GivenReading(extension)
    run = Run.prepared(
        task,
        Subject(model, documents=documents, name=name),
        [reading],
        lengths,
        max_tokens=max_tokens,
        device=device,
        ranks=ranks,
    )
    return task.by_length(computed(run, progress)[reading.method], name)


def compare_methods(
    model: nn.Module,
    documents: Sequence[TokenizedDocument],
    lengths: Sequence[int],
    extensions: Sequence[Extension],
    *,
    max_tokens: int,
    device: torch.device | str | None = None,
    stride: int | None = None,
    min_context: int | None = None,
    begin: BeginTokens = NO_BEGIN,
    progress: bool = False,
    name: str = "",
    ranks: Topology = ONE_RANK,
) -> MethodComparison:
    """Measures the perplexity of the same tokens, at every length and with every method.

    By default, the first max(lengths) - stride positions of a document are not scored. Each window
    scores `stride` positions, so at a length of n every scored token is predicted from more than n
    - stride and at most n tokens. Also scoring the first positions would include tokens whose
    context lies within the trained window, and so hide a failure beyond the window.

    Args:
        model: A causal LM that is not patched; it is unchanged afterwards.
        documents: Tokenized documents. Documents that are too short to be scored are left out.
        lengths: Context lengths in tokens.
        extensions: The methods to compare, all with the same window.
        max_tokens: Largest number of tokens in a forward pass.
        device: Device of the model; None takes the device of its first parameter.
        stride: Number of positions that a window scores; None for half of the shortest length.
        min_context: Smallest number of preceding tokens of a scored token; None for max(lengths) -
            stride + 1.
        begin: Begin tokens of the windows; see `begin_tokens`.
        progress: Whether to show a progress bar.
        name: Name of the model.
        ranks: Ranks that share the work, all of which call this function.

    Returns:
        The comparison. `str()` of it is a table in text, and `save(folder)` writes files.

    Raises:
        ValueError: if a length or option is out of range, no token can be scored, or the model does
            not support a method.
    """
    lengths = check_lengths(lengths, max_tokens)
    task = Perplexity(stride=stride, min_context=min_context, begin=begin, by_method=True)
    run = Run.prepared(
        task,
        Subject(model, documents=documents, window=extensions[0].window, name=name),
        extensions,
        lengths,
        max_tokens=max_tokens,
        device=device,
        ranks=ranks,
    )
    tables = {
        method: task.by_length(found, method) for method, found in computed(run, progress).items()
    }
    return MethodComparison(tables, extensions[0].window, name)
