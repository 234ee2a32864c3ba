"""GenerationTask: what one call of generate is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lctrain.generation.options import Completion, SamplingOptions
from lctrain.generation.token_choice import require_distributions


@dataclass(frozen=True)
class GenerationTask:
    """Prompts and options of one call of generate, after the checks.

    Attributes:
        prompts: Token ids of each prompt.
        seeds: Seed of each completion, prompt after prompt.
        options: How the next token is chosen.
        max_new_tokens: Most tokens of a completion.
        end: Tokens that end a completion.
        stop: Strings that end a completion.
        tokenizer: Tokenizer of transformers, or None.
        batch_size: Most completions that are made together.
        samples: Completions of each prompt.
    """

    prompts: Sequence[list[int]]
    seeds: Sequence[int]
    options: SamplingOptions
    max_new_tokens: int
    end: Sequence[int] = ()
    stop: Sequence[str] = ()
    tokenizer: Any = None
    batch_size: int = 64
    samples: int = 1

    @property
    def count(self) -> int:
        """Number of completions."""
        return len(self.prompts) * self.samples

    def completion(
        self, index: int, token_ids: list[int], log_probs: list[float], stopped: bool
    ) -> Completion:
        """Returns a completion.

        Args:
            index: Index of the completion; those of a prompt follow one another.
            token_ids: Generated token ids.
            log_probs: Log-probability of each.
            stopped: Whether an end token or a stop string ended it.

        Raises:
            ValueError: if the logits of a token gave no distribution.
        """
        require_distributions(log_probs, index // self.samples)
        return Completion(
            prompt_ids=self.prompts[index // self.samples],
            token_ids=token_ids,
            log_probs=log_probs,
            finish="stop" if stopped else "length",
            text=None if self.tokenizer is None else self.tokenizer.decode(token_ids),
        )
