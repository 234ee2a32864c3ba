"""Sampler: chooses the next tokens inside transformers' generation loop. Finish: ends requests.

require_distributions: refuses completions that logits without a distribution have chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lctrain.generation.options import SamplingOptions


class Sampler:
    """A logits processor that chooses a token per row, and leaves no other to be chosen.

    Adding Gumbel noise to the logits and taking the largest draws from their softmax. The noise of
    a row comes from a generator of its own, so it depends on the row's seed and step alone.

    Args:
        options: Filters of the logits.
        real: [B, S] bool, True at tokens of the prompts that are not padding.
        seeds: Seed of each row; not used at temperature 0.

    Attributes:
        log_probs: Per step, [B] float32: log-probability of the chosen tokens, from the model's
            logits over the temperature, if that is above 0. NaN where the logits have no
            distribution, see require_distributions.
    """

    def __init__(self, options: SamplingOptions, real: Tensor, seeds: Sequence[int]) -> None:
        self.log_probs: list[Tensor] = []
        self._real = real
        self._temperature = options.temperature or 1.0
        self._filters = _filters(options)
        self._penalty = _penalty(options)
        self._generators: list[torch.Generator] = []
        if options.temperature > 0:
            for seed in seeds:
                self._generators.append(torch.Generator(real.device).manual_seed(seed))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores [B, V] with 0 at the chosen token of each row, and -inf elsewhere.

        Args:
            input_ids: Prompts and completions so far, [B, S + step].
            scores: Logits of the next token, [B, V] float32.
        """
        model = torch.log_softmax(scores / self._temperature, -1)
        if self._penalty is not None:
            scores = self._penalty(self._without_padding(input_ids), scores)
        for narrow in self._filters:
            scores = narrow(input_ids, scores)
        if self._generators:
            noise = torch.empty_like(scores)
            for row, generator in zip(noise, self._generators, strict=True):
                row.exponential_(generator=generator)
            scores = scores - noise.log()
        tokens = scores.argmax(-1, keepdim=True)
        self.log_probs.append(model.gather(-1, tokens)[:, 0])
        return torch.full_like(scores, float("-inf")).scatter_(-1, tokens, 0.0)

    def _without_padding(self, input_ids: Tensor) -> Tensor:
        """Returns the ids with each row's last prompt token in place of padding."""
        length = self._real.shape[1]
        prompts = input_ids[:, :length]
        prompts = torch.where(self._real, prompts, prompts[:, -1:])
        return torch.cat((prompts, input_ids[:, length:]), 1)


class Finish:
    """A stopping criterion that remembers after how many tokens each row ended.

    Args:
        prompt: Length S of the padded prompts.
        eos: End tokens.
        stops: Function from ids of completions, [B, step], to [B] bool, True at rows that end with
            a stop string; None without stop strings.

    Attributes:
        eos_token_id: End tokens, [E] int64. Its presence makes transformers pad rows that ended.
        lengths: Number of tokens at which each row ended, [B] int64; 0 if it did not.
    """

    def __init__(
        self, prompt: int, eos: Tensor, stops: Callable[[Tensor, Any], Tensor] | None
    ) -> None:
        self.eos_token_id = eos
        self.lengths: Tensor | None = None
        self._prompt = prompt
        self._stops = stops

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Returns [B] bool, True at rows that have ended.

        Args:
            input_ids: Prompts and completions so far, [B, S + step].
            scores: Not used.
        """
        done = torch.isin(input_ids[:, -1], self.eos_token_id)
        if self._stops is not None:
            done |= self._stops(input_ids[:, self._prompt :], scores)
        if self.lengths is None:
            self.lengths = torch.zeros_like(input_ids[:, 0])
        length = input_ids.shape[1] - self._prompt
        self.lengths = torch.where(done & (self.lengths == 0), length, self.lengths)
        return self.lengths > 0


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
    return RepetitionPenaltyLogitsProcessor(options.repetition_penalty)


def _filters(options: SamplingOptions) -> list[Any]:
    """Returns transformers' processors of the options, in their order; none at temperature 0."""
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    if options.temperature == 0:
        return []
    found: list[Any] = []
    if options.temperature != 1:
        found.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k:
        found.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        found.append(TopPLogitsWarper(float(options.top_p)))
    if options.min_p:
        found.append(MinPLogitsWarper(float(options.min_p)))
    return found
