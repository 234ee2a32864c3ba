"""LossOptions and VocabularyShard: options of linear_cross_entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

SCHEMA = (
    "float softcap, float logit_scale, int ignore_index, float label_smoothing, float z_loss, "
    "int first_word, int num_words, str group_name, int chunk_tokens, ScalarType matmul_dtype, "
    "bool batch_invariant, str backend"
)
"""The fields of LossOptions as arguments of an operator."""


@dataclass(frozen=True)
class LossOptions:
    """Options of the linear cross-entropy.

    The operators take the fields as separate arguments, in the order of `SCHEMA`.

    Attributes:
        softcap: Bound of the logits; 0 turns it off.
        logit_scale: Factor of the logits.
        ignore_index: Label of tokens that have no part in the loss and in the gradients.
        label_smoothing: Fraction of the target's probability that is spread over the vocabulary.
        z_loss: Factor of the squared logsumexp that each token adds to the loss.
        first_word: Token id of the weight's first row on this rank.
        num_words: Size of the whole vocabulary, over all ranks.
        group_name: Name of the process group that shares the vocabulary; "" if it is not divided.
        chunk_tokens: Number of tokens per chunk of logits.
        matmul_dtype: Dtype of the inputs of matrix products.
        batch_invariant: Whether the bits of a token's loss depend on no other token.
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
    batch_invariant: bool
    backend: str

    def arguments(self) -> tuple[Any, ...]:
        """Returns the fields in the order of `SCHEMA`."""
        # dataclasses.astuple copies the fields, which costs host time and breaks compiled graphs
        return tuple(getattr(self, name) for name in _FIELDS)


_FIELDS = tuple(LossOptions.__dataclass_fields__)


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's rows of an output embedding, if the vocabulary is divided over ranks.

    Every rank passes all tokens and labels. Maxima and sums of the softmax are reduced over the
    group, so every rank gets the whole loss. The gradient of `hidden` is partial: the caller sums
    it over the ranks, as for any column-parallel linear layer.

    Attributes:
        first_word: Token id of the weight's first row on this rank.
        num_words: Size of the whole vocabulary, over all ranks.
        group: Process group of the ranks that share the vocabulary.
    """

    first_word: int
    num_words: int
    group: Any
