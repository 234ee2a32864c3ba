"""largest_logit: finds the largest attention logit of a model, |s q.k| with s the softmax scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lctrain.attention import is_patched
from lctrain.eval.runner import packed_kwargs, row_kwargs
from lctrain.loss import evaluation_mode

CHUNK = 1024  # queries per matrix product, which gives logits [heads, CHUNK, tokens]


def largest_logit(
    model: Any, documents: Sequence[np.ndarray], device: torch.device | str
) -> dict[str, float]:
    """Returns the largest |s q.k| of every layer, over all heads and all causal pairs.

    A forward pass of the unpatched model records the outputs of each layer's q_proj and k_proj.
    They are rotated by the layer's own RoPE and multiplied in float32: query head h with key head
    h // (H / Hk). The plain model, DiffLlama and V2 all order their heads in this way, so every
    branch of differential attention is included.

    Args:
        model: A causal LM whose attention layers have q_proj and k_proj, half-split RoPE, and no
            norm or bias of the logits.
        documents: Token ids, [n] integers each, with one forward pass per document.
        device: Device of the model.

    Returns:
        The largest logit by the name of the layer.

    Raises:
        ValueError: if the model has no such attention layer.
    """
    device = torch.device(device)
    largest: dict[str, float] = {}
    with recording(model, largest), evaluation_mode(model):
        for document in documents:
            kwargs = (
                packed_kwargs([document], device)
                if is_patched(model)
                else row_kwargs([document], len(document), device)
            )
            model.base_model(**kwargs)
    return largest


@contextmanager
def recording(model: nn.Module, largest: dict[str, float]) -> Iterator[None]:
    """Context manager: each forward pass of one row raises `largest` to the logits it has."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "q_proj") and hasattr(module, "k_proj")
    }
    if not layers:
        raise ValueError(
            f"model must have attention layers with q_proj and k_proj, got {type(model).__name__} "
            "without. Use a model like Llama."
        )
    handles = []
    for name, layer in layers.items():
        recorder = _Recorder(name, largest)
        handles += [
            layer.q_proj.register_forward_hook(recorder.keep_queries),
            layer.k_proj.register_forward_hook(recorder.keep_keys),
            layer.register_forward_hook(recorder.multiply, with_kwargs=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    """Forward hooks of one attention layer, which record the largest logit that they see."""

    def __init__(self, name: str, largest: dict[str, float]) -> None:
        self.name = name
        self.largest = largest
        self.queries = self.keys = torch.empty(0)

    def keep_queries(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.queries = output

    def keep_keys(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.keys = output

    def multiply(self, layer: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        position_embeddings = kwargs["position_embeddings"]
        width = position_embeddings[0].shape[-1]
        queries = rotated(self.queries, width, position_embeddings)
        keys = rotated(self.keys, width, position_embeddings)
        found = largest_product(queries, keys) * layer.scaling
        self.largest[self.name] = max(self.largest.get(self.name, 0.0), found)
        self.queries = self.keys = torch.empty(0)


def rotated(states: Tensor, width: int, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Splits heads and applies half-split RoPE in float32: [1, S, H * D] -> [H, S, D]."""
    if states.shape[0] != 1:
        raise ValueError(
            f"rows must be one at a time, got {states.shape[0]}. Call the model once per document."
        )
    heads = states[0].float().unflatten(-1, (-1, width)).transpose(0, 1)
    cos, sin = (part.reshape(-1, width).float() for part in position_embeddings)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def largest_product(queries: Tensor, keys: Tensor) -> float:
    """Returns the largest |q.k| over causal pairs, in the tensors' dtype without autocast.

    Args:
        queries: [H, S, D].
        keys: [Hk, S, D].
    """
    keys = keys.repeat_interleave(queries.shape[0] // keys.shape[0], dim=0)
    tokens = queries.shape[1]
    largest = queries.new_zeros(())
    for start in range(0, tokens, CHUNK):
        stop = min(start + CHUNK, tokens)
        with torch.autocast(queries.device.type, enabled=False):
            products = queries[:, start:stop] @ keys[:, :stop].transpose(1, 2)  # [H, CHUNK, stop]
        largest = torch.maximum(largest, products.tril(start).abs().max())
    return largest.item()
