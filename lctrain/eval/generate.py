"""generate_answers: the one place where evaluation tasks generate tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lctrain.loss import evaluation_mode


def generate_answers(
    model: Any, prompts: Sequence[np.ndarray], max_new_tokens: int
) -> Iterator[np.ndarray]:
    """Yields the greedy continuation of each prompt.

    Args:
        model: A transformers causal LM. Its training mode is restored.
        prompts: Token ids of each prompt, [n] integers.
        max_new_tokens: Largest number of tokens in an answer.

    Yields:
        Token ids of each answer, [m] int64, without the end token.
    """
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    ends = model.config.eos_token_id if own is None else own.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    device = next(model.parameters()).device
    for prompt in prompts:
        ids = torch.from_numpy(np.asarray(prompt, dtype=np.int64))[None].to(device)
        with evaluation_mode(model), torch.no_grad():
            # Without a mask, generate() takes pad ids inside a prompt for padding.
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
        answer = found[0, ids.shape[1] :].cpu().numpy()
        stops = np.flatnonzero(np.isin(answer, ends))
        yield answer[: stops[0]] if len(stops) else answer
