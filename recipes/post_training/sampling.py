"""Samples completions by transformers' `generate`, with the keys of each prompt computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lctrain.loss import evaluation_mode
from lctrain.models.adapters import inside_adapters


def sample(model: Any, prompts: Tensor, samples: int, new_tokens: int) -> list[Tensor]:
    """Returns completions sampled at temperature 1, cut after the end token.

    Args:
        model: A causal LM of transformers, or a PeftModel around one. It is in eval mode while it
            samples.
        prompts: [P, n] int64, prompts of equal length, n >= 2.
        samples: Number of completions of each prompt.
        new_tokens: Largest length of a completion.

    Returns:
        P * samples sequences of token ids, prompt after prompt.
    """
    from transformers import DynamicCache, GenerationConfig

    inner = inside_adapters(model)
    ends = end_tokens(inner)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else None,
    )
    cache = DynamicCache(config=inner.config)
    rows = prompts.repeat_interleave(samples, 0)
    with evaluation_mode(inner):
        inner(prompts[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(samples)
        found = inner.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            past_key_values=cache,
            generation_config=settings,
        )
    return [cut(row, ends) for row in found[:, rows.shape[1] :]]


def end_tokens(model: Any) -> list[int]:
    """Returns the end tokens of a model: none, one or several.

    Args:
        model: A causal LM of transformers.
    """
    end = model.config.eos_token_id
    if end is None:
        return []
    return [end] if isinstance(end, int) else list(end)


def cut(completion: Tensor, ends: Sequence[int]) -> Tensor:
    """Returns a completion up to its first end token, that token included.

    Args:
        completion: [n] int64 token ids.
        ends: The end tokens; without one, nothing is cut.
    """
    places = torch.isin(completion, completion.new_tensor(ends)).nonzero()
    return completion[: int(places[0]) + 1] if len(places) else completion
