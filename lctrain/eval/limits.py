"""What a model can take: its vocabulary and, if it learned its positions, how many there are.

Beyond either, an embedding is indexed out of its range, which on a GPU ends the process.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

_POSITION_TABLE = re.compile(r"(^|[._])(wpe|pos|positions?)([._]|$)")


def check_model(model: Any, tokens: Sequence[np.ndarray], longest_window: int) -> None:
    """Raises if documents or windows do not fit the model.

    Args:
        model: a causal LM of transformers.
        tokens: token ids of each document, [n] integers.
        longest_window: most tokens in a window.

    Raises:
        ValueError: for a token outside the vocabulary, or a window beyond learned positions.
            Computed positions (rotary, ALiBi) may be exceeded: that is what one measures.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    largest = max(int(ids.max()) for ids in tokens)
    if largest >= vocabulary:
        raise ValueError(
            f"documents must hold tokens below the model's vocabulary of {vocabulary}, got "
            f"{largest}. Tokenize them with the model's own tokenizer."
        )
    limit = learned_positions(model)
    if limit is not None and longest_window > limit:
        raise ValueError(
            f"lengths must be at most {limit}, the number of positions that "
            f"{type(model).__name__} has learned, got {longest_window}. Leave longer ones out."
        )


def learned_positions(model: Any) -> int | None:
    """Size of the model's table of learned positions; None where positions are computed."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITION_TABLE.search(name):
            limit = getattr(model.config, "max_position_embeddings", None)
            return min(module.num_embeddings, limit or module.num_embeddings)
    return None
