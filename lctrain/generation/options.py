"""SamplingOptions: how the next token is chosen. Completion: what `generate` returns per prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

LOWEST_TEMPERATURE = 1e-6
"""Lowest temperature but 0. Logits over a lower one may exceed the range of float32."""


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen from the logits.

    The filters apply in this order: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: Divisor of the logits; 0 chooses the most probable token.
        top_k: Number of most probable tokens that may be drawn; 0 for all.
        top_p: The fewest most probable tokens whose probabilities sum to this may be drawn.
        min_p: Tokens with less than this share of the highest probability are not drawn.
        repetition_penalty: Logits of tokens of the prompt and the completion are divided by this if
            positive, and multiplied if negative.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ValueError(
                    f"{name} must be a number, got {value!r}. Leave it out for the default."
                )
        if not (self.temperature == 0 or LOWEST_TEMPERATURE <= self.temperature < math.inf):
            raise ValueError(
                f"temperature must be 0, or finite and at least {LOWEST_TEMPERATURE}, got "
                f"{self.temperature}. Pass 0 for the most probable token."
            )
        if not isinstance(self.top_k, Integral) or self.top_k < 0:
            raise ValueError(f"top_k must be an int of at least 0, got {self.top_k}. 0 takes all.")
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p must be above 0 and at most 1, got {self.top_p}. 1 keeps all tokens."
            )
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, got {self.min_p}. 0 keeps all tokens.")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty must be finite and above 0, got {self.repetition_penalty}. 1 "
                "turns it off."
            )


@dataclass(frozen=True)
class Completion:
    """The completion of one prompt.

    Attributes:
        prompt_ids: Token ids of the prompt.
        token_ids: Generated token ids; the end token is the last one if the model chose it.
        log_probs: Log-probability of each generated token, natural logarithm, from the model's
            logits over the temperature, if that is above 0; without penalty and filters. This is
            what `lctrain.loss.token_log_probs` computes in training: with log_probs="decode" within
            rounding, with log_probs="trainer" bit for bit.
        finish: "stop" after an end token or a stop string, "length" at the limit of tokens.
        text: The decoded completion; None without a tokenizer.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    log_probs: list[float]
    finish: str
    text: str | None = None
