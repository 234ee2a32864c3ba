"""TokenChoice: chooses the next token of each row from its logits.

require_distributions: refuses completions that logits without a distribution have chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lctrain.generation.invariant_head import InvariantHead, logits_of
from lctrain.generation.noise import KEYS, add_gumbel, draw_keys, token_numbers
from lctrain.generation.nucleus import keep_top_p
from lctrain.generation.options import SamplingOptions


class TokenChoice:
    """Chooses a token per row: the most probable one, or one drawn from the softmax.

    Adding Gumbel noise to the logits and taking the largest draws from their softmax. The noise of
    a row is a function of its seed and the position of the token: see `lctrain.generation.noise`.
    Nothing is read from the device and no generator is used, so a CUDA graph can hold a choice.

    Args:
        options: Filters of the logits.
        head: Computes logits and log-probabilities from the scores, for a batch-invariant model;
            None if the scores are logits.

    Attributes:
        reads_history: Whether the choice depends on the tokens before.
    """

    def __init__(self, options: SamplingOptions, head: InvariantHead | None = None) -> None:
        self._head = head
        self._draws = options.temperature > 0
        self._temperature = float(options.temperature or 1)
        self._filters = _filters(options)
        self._penalty = _penalty(options)
        self.reads_history = self._penalty is not None
        self._numbers: Tensor | None = None
        self._top_p: float | None = None  # a kernel has no other filter
        if not (options.top_k or options.min_p):
            self._top_p = float(options.top_p)

    def keys(self, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Returns the keys of each row's draw, [B, KEYS] int32 on the CPU; zeros at temperature 0.

        Args:
            seeds: Seed of each row.
            positions: Position of the token to be chosen in each row.
        """
        if self._draws:
            return draw_keys(seeds, positions)
        return torch.zeros(len(positions), KEYS, dtype=torch.int32)

    def __call__(
        self, history: Tensor | None, scores: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the chosen tokens [B] int64 and their log-probabilities [B] float32.

        The log-probabilities are those of the logits over the temperature, if that is above 0,
        without penalty and filters. They are NaN where the logits have no distribution, see
        require_distributions.

        Args:
            history: Tokens that occurred in each row, in any order and number, [B, S] int64; None
                if the choice does not depend on them.
            scores: What CachedForward returned: logits of the next token, [B, V] floating point.
            keys: Keys of each row's draw, on the device of the scores.
        """
        if self._head is None and not self.reads_history:
            found = self._by_one_kernel(scores, keys)
            if found is not None:
                return found
        given, scores = scores, logits_of(self._head, scores)
        tempered = self._tempered(scores)
        model = torch.log_softmax(tempered, -1) if self._head is None else None
        if self._penalty is None:
            scores = tempered
        else:
            scores = self._tempered(self._penalty(history, scores))
        for narrow in self._filters:
            scores = narrow(history, scores)
        if self._draws:
            scores = add_gumbel(scores, keys, self._numbers_of(scores))
        tokens = scores.argmax(-1)
        if model is None:
            assert self._head is not None
            return tokens, self._head.head.log_probs(given, tokens)
        return tokens, model.gather(-1, tokens[:, None])[:, 0]

    def _by_one_kernel(self, logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns what a call returns, from one kernel; None if none serves the call."""
        from lctrain_kernels.sampling.api import draw, draws_on, most_probable

        if not self._draws:
            tokens, log_probs = most_probable(logits)
            return tokens, log_probs.float()
        if self._top_p is None or not draws_on(logits):
            return None
        return draw(logits, keys, self._numbers_of(logits), self._temperature, self._top_p)

    def _numbers_of(self, scores: Tensor) -> Tensor:
        """Returns the token_numbers for scores [B, V], made once."""
        if self._numbers is None:
            self._numbers = token_numbers(scores.shape[1], scores.device)
        return self._numbers

    def _tempered(self, scores: Tensor) -> Tensor:
        """Returns the scores over the temperature; the scores themselves at 1, without a pass."""
        return scores if self._temperature == 1 else scores / self._temperature


def require_distributions(log_probs: Sequence[float], prompt: int) -> None:
    """Checks that every token of a completion was chosen from a distribution.

    The logits of a step have none if one of them is NaN or +inf, or if all of them are -inf. The
    chosen token is meaningless then, and its log-probability is NaN.

    Args:
        log_probs: Log-probability of each token of the completion.
        prompt: Index of the prompt, for the message.

    Raises:
        ValueError: if a log-probability is NaN.
    """
    for step, value in enumerate(log_probs):
        if math.isnan(value):
            raise ValueError(
                f"the logits of prompt {prompt} at generated token {step} must give a distribution "
                "over the vocabulary, got NaN, +inf, or -inf for all tokens. Look for weights that "
                "are not finite, or for activations beyond the range of the dtype: generate in "
                "bfloat16 or float32."
            )


def _penalty(options: SamplingOptions) -> Any:
    from transformers import RepetitionPenaltyLogitsProcessor

    if options.repetition_penalty == 1:
        return None
    return RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty))


def _top_p(history: Tensor | None, scores: Tensor, top_p: float) -> Tensor:
    return keep_top_p(scores, top_p)


def _filters(options: SamplingOptions) -> list[Any]:
    """Returns the filters behind the temperature, in their order; none at 0."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper

    if options.temperature == 0:
        return []
    found: list[Any] = []
    if options.top_k:
        found.append(TopKLogitsWarper(int(options.top_k)))
    if options.top_p < 1:
        found.append(partial(_top_p, top_p=float(options.top_p)))
    if options.min_p:
        found.append(MinPLogitsWarper(float(options.min_p)))
    return found
