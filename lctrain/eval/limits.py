"""Checks that documents fit a model's vocabulary and its table of learned positions.

On a GPU, an index beyond an embedding table aborts the process, so it is checked on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lctrain.data.vocabulary import vocabulary_size
from lctrain.models.positions import require_positions
from lctrain.models.window import configured_window
from lctrain.warn import warn_once

log = logging.getLogger(__name__)


def check_model(model: Any, tokens: Sequence[np.ndarray], longest_window: int) -> None:
    """Raises ValueError if documents or windows do not fit the model.

    Args:
        model: A causal LM of transformers.
        tokens: Token ids of each document, [n] integers.
        longest_window: Number of tokens in the longest window.

    Raises:
        ValueError: if a token is outside the vocabulary, or a window is longer than the model's
            table of learned positions. Models with computed positions (rotary, ALiBi) have no such
            limit.
    """
    vocabulary = vocabulary_size(model)
    largest = max(int(ids.max()) for ids in tokens)
    if largest >= vocabulary:
        raise ValueError(
            f"documents must hold tokens below the model's vocabulary of {vocabulary}, got "
            f"{largest}. Tokenize them with the model's own tokenizer."
        )
    require_positions(model, longest_window, "lengths", "Leave longer ones out.")


def kind_of(model: Any) -> str:
    """Returns "mlm" for a transformers model for masked language modeling, else "causal"."""
    masked = any(base.__name__.endswith("ForMaskedLM") for base in type(model).__mro__)
    return "mlm" if masked else "causal"


def require_kind(task: str, reads: str, model: Any) -> None:
    """Raises ValueError unless a task can read with a model.

    Args:
        task: Name of the task.
        reads: Kind of model that the task reads with, "causal" or "mlm".
        model: A model of transformers.
    """
    if reads == kind_of(model):
        return
    if reads == "causal":
        raise ValueError(
            f"tasks must be [masked_perplexity] for a masked language model, got {task}, which "
            f"needs a causal one, with a {type(model).__name__}. Leave tasks out."
        )
    raise ValueError(
        f"tasks must be some that a causal language model can run, got {task}, which needs a "
        f"masked one, with a {type(model).__name__}. Choose perplexity."
    )


def warn_beyond_positions(
    model: Any, window: int | None, lengths: Mapping[str, Sequence[int]]
) -> None:
    """Warns once about lengths that the model was not trained on, and that no method extends.

    Args:
        model: A causal LM of transformers.
        window: Length of the texts that the model was trained on; None for that of its config.
        lengths: Context lengths in tokens, by name of the task.
    """
    window = configured_window(model.config) if window is None else window
    if window is None:
        return
    beyond = {name: longest for name, of in lengths.items() if (longest := max(of)) > window}
    if beyond:
        warn_once(
            log,
            "lengths must be at most the %s positions of the model, got %s. Compare methods that "
            "read beyond them, with methods=[plain,yarn,dual_chunk], or leave longer lengths out.",
            f"{window:,}",
            ", ".join(f"{longest:,} for {name}" for name, longest in beyond.items()),
        )
