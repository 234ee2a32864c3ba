"""TokenChoice: chooses the next token of each row from its logits.

require_distributions: refuses completions that logits without a distribution have chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lctrain.generation.options import SamplingOptions


class TokenChoice:
    """Chooses a token per row: the most probable one, or one drawn from the softmax.

    Adding Gumbel noise to the logits and taking the largest draws from their softmax. The noise of
    a row comes from a generator of its own, so it depends on the row's seed and step alone.

    Args:
        options: Filters of the logits.

    Attributes:
        reads_history: Whether the choice depends on the tokens before.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self._draws = options.temperature > 0
        self._temperature = float(options.temperature or 1)
        self._filters = _filters(options)
        self._penalty = _penalty(options)
        self.reads_history = self._penalty is not None

    def generator(self, seed: int, device: torch.device) -> torch.Generator | None:
        """Returns the generator of a row's noise; None at temperature 0.

        Args:
            seed: Seed of the row.
            device: Device of the logits.
        """
        return torch.Generator(device).manual_seed(seed) if self._draws else None

    def __call__(
        self, history: Tensor | None, scores: Tensor, generators: Sequence[torch.Generator | None]
    ) -> tuple[Tensor, Tensor]:
        """Returns the chosen tokens [B] int64 and their log-probabilities [B] float32.

        The log-probabilities are those of the logits over the temperature, if that is above 0,
        without penalty and filters. They are NaN where the logits have no distribution, see
        require_distributions.

        Args:
            history: Tokens that occurred in each row, in any order and number, [B, S] int64; None
                if the choice does not depend on them.
            scores: Logits of the next token, [B, V] float32.
            generators: Generator of each row's noise.
        """
        tempered = self._tempered(scores)
        model = torch.log_softmax(tempered, -1)
        if self._penalty is None:
            scores = tempered
        else:
            scores = self._tempered(self._penalty(history, scores))
        for narrow in self._filters:
            scores = narrow(history, scores)
        if self._draws:
            noise = torch.empty_like(scores)
            for row, generator in zip(noise, generators, strict=True):
                row.exponential_(generator=generator)
            scores = torch.sub(scores, noise.log_(), out=noise)
        tokens = scores.argmax(-1)
        return tokens, model.gather(-1, tokens[:, None])[:, 0]

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


def _filters(options: SamplingOptions) -> list[Any]:
    """Returns transformers' filters behind the temperature, in their order; none at 0."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if options.temperature == 0:
        return []
    found: list[Any] = []
    if options.top_k:
        found.append(TopKLogitsWarper(int(options.top_k)))
    if options.top_p < 1:
        found.append(TopPLogitsWarper(float(options.top_p)))
    if options.min_p:
        found.append(MinPLogitsWarper(float(options.min_p)))
    return found
