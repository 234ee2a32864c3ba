"""Limits of a model: its vocabulary and, if it learned its positions, their number.

Beyond either, an embedding is indexed out of its range, which on a GPU ends the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lctrain.models.positions import require_positions


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
    require_positions(model, longest_window, "lengths", "Leave longer ones out.")
