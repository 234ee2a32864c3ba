"""generate_answers: the one place where evaluation tasks generate tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lctrain.generation import generate


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
    """
    found = generate(
        model,
        [np.asarray(prompt).tolist() for prompt in prompts],
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        batch_size=len(prompts),
        cache_gib=cache_gib,
    )
    return [np.array(one.token_ids, dtype=np.int64) for one in found]
