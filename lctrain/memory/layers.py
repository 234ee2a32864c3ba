"""Applies a memory policy to a model: activation checkpointing with a choice for every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lctrain.attention import is_patched
from lctrain.memory.attention import KeptResults
from lctrain.memory.store import HostStore, OnDevice
from lctrain.memory.tiles import TiledMLPs

DEVICE, HOST, RECOMPUTE = "device", "host", "recompute"
INPUT, ATTENTION = "input", "attention"
_HANDLE = "_lctrain_memory"  # attribute of a model: the handle of its policy


@dataclass(frozen=True)
class LayerPolicy:
    """Which activations one layer keeps from its forward to its backward, and where.

    The backward recomputes all other activations of the layer.

    Attributes:
        inputs: Storage of the layer's input, its hidden states: "device" or "host".
        attention: Storage of the outputs and the lse of the layer's attention: "device" or "host";
            or "recompute" if the backward computes attention again.
    """

    inputs: str = DEVICE
    attention: str = RECOMPUTE


class LayerCheckpoints:
    """Makes a transformers model run every decoder layer under activation checkpointing, by policy.

    In training mode, transformers calls a layer through the layer's `_gradient_checkpointing_func`.
    This class sets that function, so no `forward` is replaced.

    Attributes:
        policies: LayerPolicy of every layer, in the model's order.
        store: The HostStore that holds what the policies move to the host; None if they move
            nothing.

    Args:
        model: A transformers model, without adapters around it.
        policies: LayerPolicy of every layer.
        store: The HostStore for tensors on the host; None if the policies move nothing.
        mlp_tokens: Number of tokens that an MLP computes at a time; None for all tokens at once.
    """

    def __init__(
        self,
        model: Any,
        policies: Sequence[LayerPolicy],
        store: HostStore | None = None,
        mlp_tokens: int | None = None,
    ) -> None:
        self._model = model
        layers = checkpointed_layers(model)
        self._tiles = None if mlp_tokens is None else TiledMLPs(layers, mlp_tokens)
        remove_policy(model)  # the earlier policy's tiles; the tiles made above stay
        vars(model)[_HANDLE] = self
        self._has_operators = False  # whether the model is known to have lctrain's attention
        self.policies = tuple(policies)
        self.store = store
        plain = partial(checkpoint, use_reentrant=False)
        # Unlike reentrant checkpoints, these do not require an input that needs a gradient.
        model._set_gradient_checkpointing(True, plain)
        for layer, policy in zip(layers, self.policies, strict=True):
            layer._gradient_checkpointing_func = partial(self.run, policy)

    def remove(self) -> None:
        """Undoes checkpointing and MLP tiles, unless another policy has replaced this one."""
        if vars(self._model).get(_HANDLE) is not self:
            return
        del vars(self._model)[_HANDLE]
        if self._tiles is not None:
            self._tiles.remove()
        self._model._set_gradient_checkpointing(False)

    def run(
        self, policy: LayerPolicy, layer: Callable[..., Any], *given: Any, **options: Any
    ) -> Any:
        """Calls a layer, and keeps the tensors that its policy names for the backward.

        Args:
            policy: The layer's policy.
            layer: The layer's forward.
            *given: Positional arguments of the layer; the first one is the hidden states [B, S, E].
            **options: Keyword arguments of the layer.

        Returns:
            The layer's output.

        Raises:
            ValueError: if the policy keeps more than inputs on the GPU under torch.compile, or
                attention that is not lctrain's.
        """
        plain = policy == LayerPolicy()
        if not plain and torch.compiler.is_compiling():
            _refuse_compilation()
        if policy.attention != RECOMPUTE and not self._has_operators:
            self._require_operators()
        x = given[0] if given else None
        group = None if self.store is None else self.store.group()
        if self.store is not None and HOST not in (policy.inputs, policy.attention):
            self.store.advance()
        if plain or not isinstance(x, Tensor) or not torch.is_grad_enabled():
            return checkpoint(layer, *given, use_reentrant=False, **options)
        contexts: dict[str, Any] = {}
        if policy.attention != RECOMPUTE:
            tokens = x.shape[:-1].numel()
            results = KeptResults(partial(self._keep_result, policy.attention, group, tokens))
            contexts["context_fn"] = results.contexts
        if policy.inputs == DEVICE:
            return checkpoint(layer, *given, use_reentrant=False, **contexts, **options)
        assert self.store is not None
        assert group is not None
        kept, needs_gradient = (
            self.store.put(x, INPUT, group, x.shape[:-1].numel()),
            x.requires_grad,
        )
        first = [x]

        def call(_: Tensor, *rest: Any, **named: Any) -> Any:
            states = first.pop() if first else kept.get().requires_grad_(needs_gradient)
            return layer(states, *rest, **named)

        # From this empty tensor torch reads the device whose RNG and autocast state to restore.
        device = x.new_empty(0)
        del x
        rest = given[1:]
        del given
        return checkpoint(call, device, *rest, use_reentrant=False, **contexts, **options)

    def _require_operators(self) -> None:
        """Raises ValueError if the model's attention is not lctrain's, which alone can be kept."""
        if not any(map(is_patched, self._model.modules())):
            raise ValueError(
                "memory must recompute the attention of a model that is not patched, got "
                "keep_attention or host_attention above 0: only lctrain's attention can be kept. "
                "Choose attention=flash (lctrain.patch_model), or set both to 0."
            )
        self._has_operators = True

    def _keep_result(self, place: str, group: Any, tokens: int, x: Tensor) -> Any:
        if place == DEVICE or self.store is None:
            return OnDevice(x)
        return self.store.put(x, f"{ATTENTION} {x.dim()}", group, tokens)


@torch.compiler.disable(reason="memory=offload and kept attention need a model as it is")
def _refuse_compilation() -> None:
    """Raises ValueError inside torch.compile, which cannot trace copies and kept results."""
    raise ValueError(
        "memory must keep nothing but inputs on the GPU under torch.compile, got offloaded inputs "
        "or kept attention. Use memory=checkpoint with keep_attention=0, or do not compile."
    )


def remove_policy(model: Any) -> None:
    """Removes the memory policy of a model, if it has one.

    Args:
        model: A transformers model, without adapters around it.
    """
    handle = vars(model).get(_HANDLE)
    if handle is not None:
        handle.remove()


def checkpointed_layers(model: nn.Module) -> list[Any]:
    """Returns the layers that transformers can run under checkpointing, in the model's order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
