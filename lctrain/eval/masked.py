"""masked_perplexity_by_length: how well a masked language model fills in tokens, by context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lctrain.distributed import ONE_RANK, Topology
from lctrain.eval.reading import GivenReading
from lctrain.eval.records import Subject
from lctrain.eval.run_task import Run, computed
from lctrain.eval.table import PerplexityTable
from lctrain.eval.tasks.masked import MaskedPerplexity
from lctrain.limits import check_lengths

if TYPE_CHECKING:
    from lctrain.data import MaskTokens, TokenizedDocument


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
    task = MaskedPerplexity(masking=masking)
    run = Run.prepared(
        task,
        Subject(model, documents=documents, name=name),
        [GivenReading()],
        lengths,
        max_tokens=max_tokens,
        device=device,
        ranks=ranks,
    )
    return task.by_length(computed(run, progress)[""], name)
