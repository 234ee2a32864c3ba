"""Sampler: chooses the next tokens inside transformers' generation loop. Finish: ends requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lctrain.generation.options import SamplingOptions
from lctrain.generation.token_choice import TokenChoice


class Sampler:
    """A logits processor that chooses a token per row, and leaves no other to be chosen.

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
        self._choice = TokenChoice(options)
        self._seeds = seeds
        self._lengths: list[int] = real.sum(-1).tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores [B, V] with 0 at the chosen token of each row, and -inf elsewhere.

        Args:
            input_ids: Prompts and completions so far, [B, S + step].
            scores: Logits of the next token, [B, V] float32.
        """
        step = len(self.log_probs)
        keys = self._choice.keys(self._seeds, [length + step for length in self._lengths])
        history = self._without_padding(input_ids)
        tokens, log_probs = self._choice(history, scores, keys.to(scores.device))
        self.log_probs.append(log_probs)
        return torch.full_like(scores, float("-inf")).scatter_(-1, tokens[:, None], 0.0)

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
