"""CachedForward: calls a patched model with a CacheStep. measure_cache: what its layers store.

without_router_loss: keeps the auxiliary loss of experts out of generation.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.attention.cache_step import STEP_ARGUMENT, CacheStep, StepAttention
from lctrain.attention.cached import cached_rows
from lctrain.generation.invariant_head import InvariantHead
from lctrain.generation.pages import CacheShape
from lctrain.generation.wide_logits import wide_logits
from lctrain.models.code import parameters

MOST_HEAD_DIM = 256
"""Largest head dim of the decode kernels."""


class CachedForward:
    """Calls a patched causal LM on packed tokens, whose attention a CacheStep computes.

    Args:
        model: A causal LM of transformers, or a model of PEFT around one.
        head: Computes products with the output embedding in place of logits, for a batch-invariant
            model.

    Attributes:
        device: Device of the weights.
        head: The argument.
    """

    def __init__(self, model: Any, head: InvariantHead | None = None) -> None:
        self.head = head
        self.device: torch.device = next(model.parameters()).device
        self._model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._base = base
        self._keeps = "logits_to_keep" in parameters(base)
        self._fixed = without_router_loss(model)
        self._mask = cached_rows(None, 1, 1, self.device)

    def __call__(
        self, ids: Tensor, positions: Tensor, step: CacheStep, keep: Tensor | None = None
    ) -> Tensor:
        """Returns the logits of tokens, [n, V]; float32 where wide_logits applies.

        With a head, the result is what its `products` returns.

        Args:
            ids: Token ids [1, T] int64.
            positions: Position of each token in its request, [1, T] int64.
            step: Computes the attention of all layers.
            keep: Indices of the tokens whose logits are returned, [n] int64; None for all.
        """
        arguments: dict[str, Any] = {STEP_ARGUMENT: step, **self._fixed}
        if self.head is not None:
            hidden = self.head.decoder(
                input_ids=ids,
                position_ids=positions,
                attention_mask=self._mask,
                use_cache=False,
                return_dict=True,
                **{STEP_ARGUMENT: step},
            )[0][0]
            return self.head.head.products(hidden if keep is None else hidden[keep])
        if keep is not None and self._keeps:
            arguments["logits_to_keep"] = keep
        few = keep is None or self._keeps  # otherwise a pack of logits would need twice the memory
        with wide_logits(self._base) if few else nullcontext():
            logits = self._model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=self._mask,
                use_cache=False,
                return_dict=True,
                **arguments,
            ).logits[0]
        return logits if few else logits[keep]


def without_router_loss(model: Any) -> dict[str, bool]:
    """Returns the argument that turns the auxiliary loss of experts off; none if there is no such.

    With `output_router_logits` in its config, a model computes that loss in every forward pass. It
    fails in generation, where masks have another length than the new tokens.

    Args:
        model: A causal LM of transformers, or a model of PEFT around one.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = "output_router_logits"
    return {name: False} if name in parameters(base) else {}


class _Measure:
    """A CacheStep that stores nothing, and remembers what each layer would have stored."""

    lengths: Tensor | None = None

    def __init__(self) -> None:
        self.layers: list[int | None] = []
        self.shapes: set[tuple[int, int, int, torch.dtype]] = set()
        self.causal = True
        self.prefix_cost = 1.0

    def attend(
        self,
        module: nn.Module,
        states: tuple[Tensor, Tensor, Tensor],
        attention: StepAttention,
        arguments: dict[str, Any],
    ) -> Tensor:
        query, key, value = states
        self.layers.append(getattr(module, "layer_idx", None))
        self.shapes.add((key.shape[1], key.shape[3], value.shape[3], value.dtype))
        self.causal &= attention.causal
        self.prefix_cost = max(self.prefix_cost, attention.prefix_cost)
        size = (1, query.shape[2], attention.heads, attention.width)
        return value.new_zeros(size)


def measure_cache(model: Any) -> CacheShape | str:
    """Returns the shape of a model's keys and values, from a forward pass of one token.

    Args:
        model: A patched causal LM in eval mode.

    Returns:
        The shape; or, if the layers do not fit one paged cache, the reason as a text.
    """
    forward, step = CachedForward(model), _Measure()
    zero = torch.zeros(1, 1, dtype=torch.int64, device=forward.device)
    forward(zero, zero, step)
    if not step.layers or step.layers != list(range(len(step.layers))):
        return "its layers share a cache, or are not numbered from 0"
    if not step.causal:
        return "a layer is not causal"
    if len(step.shapes) > 1:
        return "its layers have keys of several shapes"
    ((heads, head_dim, value_dim, dtype),) = step.shapes
    if value_dim != head_dim or head_dim > MOST_HEAD_DIM:
        return f"keys and values have head dims {head_dim} and {value_dim}"
    if forward.device.type == "cuda" and dtype not in (torch.bfloat16, torch.float16):
        return f"its attention computes in {dtype} on a GPU"
    return CacheShape(len(step.layers), heads, head_dim, dtype, step.prefix_cost)
