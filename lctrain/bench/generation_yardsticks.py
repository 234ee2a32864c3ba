"""Prompts of `lctrain-bench generation`, and what its figures are compared with."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from lctrain.batch import PackedBatch
from lctrain.bench.shapes import ModelShape
from lctrain.generation import completion_packs
from lctrain.generation.options import Completion
from lctrain.loss import token_log_probs


def make_prompts(requests: int, shortest: int, longest: int, vocabulary: int) -> list[list[int]]:
    """Returns prompts of random tokens whose lengths are spread evenly, in a random order."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.linspace(shortest, longest, requests).long()
    lengths = lengths[torch.randperm(requests, generator=draw)]
    return [torch.randint(vocabulary, (int(n),), generator=draw).tolist() for n in lengths]


def floor_seconds(
    model: Any, shape: ModelShape, prompts: Sequence[list[int]], new_tokens: int, bandwidth: float
) -> float:
    """Returns the seconds to read weights, keys and values of all decode steps.

    Args:
        model: The model; a table of embeddings that is not the output head is not read.
        shape: Shape of the model.
        prompts: Token ids of each prompt.
        new_tokens: Tokens of each completion; the first one comes from the prefill.
        bandwidth: Bytes per second.
    """
    settings, size = shape.settings, next(model.parameters()).element_size()
    weights = sum(weight.numel() for weight in model.parameters())
    if not settings["tie_word_embeddings"]:
        weights -= settings["vocab_size"] * settings["hidden_size"]
    width = settings["num_key_value_heads"] * settings["head_dim"]
    per_token = 2 * settings["num_hidden_layers"] * width
    steps = new_tokens - 1
    stored = steps * sum(map(len, prompts)) + len(prompts) * steps * (steps + 1) // 2
    return size * (steps * weights + stored * per_token) / bandwidth


def prefill_flops(model: Any, shape: ModelShape, prompts: Sequence[list[int]]) -> int:
    """Returns the operations of the matrix products and of causal attention to read the prompts.

    Args:
        model: The model. Its embeddings take no product, and its head one per prompt.
        shape: Shape of the model.
        prompts: Token ids of each prompt.
    """
    settings = shape.settings
    table = settings["vocab_size"] * settings["hidden_size"]
    weights = sum(weight.numel() for weight in model.parameters())
    weights -= table * (1 if settings["tie_word_embeddings"] else 2)
    width = settings["num_attention_heads"] * settings["head_dim"]
    pairs = sum(len(prompt) * (len(prompt) + 1) // 2 for prompt in prompts)
    attention = 4 * settings["num_hidden_layers"] * width * pairs
    return 2 * (weights * sum(map(len, prompts)) + table * len(prompts)) + attention


def log_prob_difference(model: Any, completions: Sequence[Completion]) -> dict[str, float]:
    """Returns how far rollouts are from a packed training forward of the same tokens, in nats.

    Args:
        model: The patched model.
        completions: Completions of the model.
    """
    batch = _pack(model, completions)
    with torch.no_grad():
        trained = token_log_probs(model, batch).log_probs.float().cpu()
    rollout = torch.tensor([x for one in completions for x in one.log_probs])
    apart = (rollout - trained).abs()
    return {"mean": float(apart.mean()), "largest": float(apart.max()), "tokens": len(apart)}


def forward_seconds(model: Any, completions: Sequence[Completion], rounds: int = 3) -> float:
    """Returns the median seconds of a packed training forward of completions, without gradients.

    Args:
        model: The patched model, which has run such a forward before.
        completions: Completions of the model.
        rounds: Number of forwards.
    """
    batch = _pack(model, completions)
    times = []
    with torch.no_grad():
        for _ in range(rounds):
            start = time.perf_counter()
            token_log_probs(model, batch).log_probs.sum().item()  # waits for the forward
            times.append(time.perf_counter() - start)
    return round(median(times), 6)


def _pack(model: Any, completions: Sequence[Completion]) -> PackedBatch:
    """Returns completions as documents of one pack, on the model's device."""
    (pack,) = completion_packs(completions, max_tokens=sys.maxsize, share_prompts=False)
    return pack.to(next(model.parameters()).device)
