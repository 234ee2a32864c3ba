"""Options of a linear cross-entropy."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch

SCHEMA = (
    "float softcap, float logit_scale, int ignore_index, float label_smoothing, float z_loss, "
    "int first_word, int num_words, str group_name, int chunk_tokens, ScalarType matmul_dtype, "
    "str backend"
)
"""The fields of LossOptions as arguments of an operator."""


@dataclass(frozen=True)
class LossOptions:
    """Options of the loss. An operator takes them as separate arguments (`SCHEMA`).

    Attributes:
        softcap: Bound of the logits; 0 turns it off.
        logit_scale: Factor of the logits.
        ignore_index: Label of tokens that count nowhere.
        label_smoothing: Fraction of the target's probability that is spread over the vocabulary.
        z_loss: Factor of the squared log-normaliser that is added to the loss.
        first_word: Token id of the weight's first row.
        num_words: Words of the whole vocabulary.
        group_name: Process group whose ranks hold the other rows; "" where this rank holds all.
        chunk_tokens: Tokens whose logits exist at one time.
        matmul_dtype: dtype of the products' inputs.
        backend: Implementation: "triton" or "pytorch".
    """

    softcap: float
    logit_scale: float
    ignore_index: int
    label_smoothing: float
    z_loss: float
    first_word: int
    num_words: int
    group_name: str
    chunk_tokens: int
    matmul_dtype: torch.dtype
    backend: str

    def arguments(self) -> tuple[Any, ...]:
        """The fields in the order of `SCHEMA`."""
        return astuple(self)


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's rows of an output embedding that is divided over ranks.

    Every rank passes all tokens and labels. Maxima and sums of the softmax are reduced over the
    group, so every rank gets the whole loss. The gradient of `hidden` is this rank's part: the
    caller adds the parts, as in any layer that is divided by columns.

    Attributes:
        first_word: Token id of the weight's first row.
        num_words: Words of the whole vocabulary.
        group: Process group of the ranks that hold the other rows.
    """

    first_word: int
    num_words: int
    group: Any
