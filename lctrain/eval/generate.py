"""generate_answers: the one place where evaluation tasks generate tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lctrain.generation import generate
from lctrain.generation.pages import CacheMemoryError


def generate_answers(
    model: Any,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    cache_gib: float | None = None,
) -> list[np.ndarray]:
    """Returns the greedy continuations of prompts, which are read together.

    Args:
        model: A transformers causal LM. Its training mode is restored.
        prompts: Token ids of each prompt, [n] integers.
        max_new_tokens: Largest number of tokens in an answer.
        cache_gib: Most memory of the paged cache in GiB; None for a share of the free memory.

    Returns:
        Token ids of each answer, [m] int64; the end token is the last one if the model chose it.

    Raises:
        ValueError: if the keys and values of a prompt do not fit the memory.
    """
    try:
        found = generate(
            model,
            [np.asarray(prompt).tolist() for prompt in prompts],
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            batch_size=len(prompts),
            cache_gib=cache_gib,
        )
    except CacheMemoryError as error:
        longest = max(map(len, prompts)) + max_new_tokens
        raised = "" if cache_gib is None else "raise the callback's cache_gib, "
        raise ValueError(
            "lengths must leave memory for the keys and values of a prompt beside the model, got "
            f"{longest:,} tokens with the answer. Leave out the longest lengths, {raised}take a "
            "GPU with more memory, or score by likelihood, which keeps none."
        ) from error
    return [np.array(one.token_ids, dtype=np.int64) for one in found]
