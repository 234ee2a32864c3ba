"""Applies a memory policy to a model: activation checkpointing with a choice for every layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lctrain.attention import is_patched
from lctrain.instances import require_instance, require_sequence
from lctrain.memory.attention import KeptResults, RebuiltResults
from lctrain.memory.compiled import REFUSED
from lctrain.memory.segments import LayerCall, LayerInput
from lctrain.memory.store import HostStore, OnDevice
from lctrain.memory.tiles import TiledMLPs
from lctrain.warn import warn_caller
from lctrain_kernels.by_head import backward_by_head
from lctrain_kernels.in_place import inputs_rebuilt

DEVICE, HOST, RECOMPUTE, REBUILT = "device", "host", "recompute", "rebuilt"
INPUT, ATTENTION = "input", "attention"
_HANDLE = "_lctrain_memory"  # attribute of a model: the handle of its policy


@dataclass(frozen=True)
class LayerPolicy:
    """Which activations one layer keeps from its forward to its backward, and where.

    The backward recomputes all other activations of the layer.

    Attributes:
        inputs: Storage of the layer's input, its hidden states: "device" or "host"; or "recompute"
            if the backward runs the layer before it once more, whose output this input is.
        attention: Storage of the outputs and the lse of the layer's attention: "device" or "host";
            "recompute" if every run of the layer in the backward computes attention; or "rebuilt"
            if the run that rebuilds the next layer's input does, and keeps them on the GPU until
            this layer's backward.
    """

    inputs: str = DEVICE
    attention: str = RECOMPUTE


class LayerCheckpoints:
    """Runs every decoder layer of a transformers model under checkpointing, each by its policy.

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
        by_head: Whether attention's backward computes one key/value head at a time.
    """

    def __init__(
        self,
        model: Any,
        policies: Sequence[LayerPolicy],
        store: HostStore | None = None,
        mlp_tokens: int | None = None,
        by_head: bool = False,
    ) -> None:
        require_instance("model", model, nn.Module, "Pass a model of transformers.")
        require_sequence("policies", policies, "Pass one LayerPolicy per layer.")
        self._model = model
        self._by_head = by_head
        self._layers = layers = checkpointed_layers(model)
        self._tiles = None if mlp_tokens is None else TiledMLPs(layers, mlp_tokens)
        remove_policy(model)  # the earlier policy's tiles; the tiles made above stay
        vars(model)[_HANDLE] = self
        self._before: weakref.ref[LayerCall] | None = None  # call of the layer before this one
        self._warned = False
        self._has_operators = False  # whether the model is known to have lctrain's attention
        self.policies = tuple(policies)
        self.store = store
        plain = partial(checkpoint, use_reentrant=False)
        # Unlike reentrant checkpoints, these do not require an input that needs a gradient.
        model._set_gradient_checkpointing(True, plain)
        for index, layer in zip(range(len(self.policies)), layers, strict=True):
            layer._gradient_checkpointing_func = partial(self.run, index)

    def remove(self) -> None:
        """Undoes checkpointing and MLP tiles, unless another policy has replaced this one."""
        if vars(self._model).get(_HANDLE) is not self:
            return
        del vars(self._model)[_HANDLE]
        if self._tiles is not None:
            self._tiles.remove()
        self._model._set_gradient_checkpointing(False)

    def run(self, index: int, layer: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """Calls a layer, and keeps the tensors that its policy names for the backward.

        Args:
            index: Number of the layer, from 0.
            layer: The layer's forward.
            *given: Positional arguments of the layer; the first one is the hidden states [B, S, E].
            **options: Keyword arguments of the layer.

        Returns:
            The layer's output.

        Raises:
            ValueError: if the policy keeps more than inputs on the GPU, and torch.compile compiles
                the layer; or if it keeps the outputs of an attention that is not lctrain's.
        """
        policy = self.policies[index]
        repeated = self.policies[index + 1 : index + 2]  # its output is rebuilt for the next layer
        repeats = any(following.inputs == RECOMPUTE for following in repeated)
        plain = policy == LayerPolicy() and not repeats
        if not torch.compiler.is_compiling():
            layer = partial(_run_rebuilt, layer, self._by_head)
        elif self._by_head or not plain:
            _refuse_compilation()
        if policy.attention != RECOMPUTE and not self._has_operators:
            self._require_operators()
        x = given[0] if given else None
        group = None if self.store is None else self.store.group()
        if self.store is not None and HOST not in (policy.inputs, policy.attention):
            self.store.advance()
        if plain or not isinstance(x, Tensor) or not torch.is_grad_enabled():
            self._before = None
            return checkpoint(layer, *given, use_reentrant=False, **options)
        contexts: dict[str, Any] = {}
        results = None
        if policy.attention != RECOMPUTE:
            tokens = x.shape[:-1].numel()
            made = RebuiltResults if policy.attention == REBUILT else KeptResults
            results = made(partial(self._keep_result, policy.attention, group, tokens))
            contexts["context_fn"] = results.contexts
        if policy.inputs == DEVICE and not repeats:
            self._before = None
            return checkpoint(layer, *given, use_reentrant=False, **contexts, **options)
        needs_gradient = x.requires_grad
        kept = LayerInput(self._keep_input(policy.inputs, group, x))
        this = None
        if repeats:
            module = self._layers[index]
            this = LayerCall(layer, x, given[1:], options, kept, results, module)
        first = [x]

        # `this` lives as long as the closure, and so as the layer's checkpoint.
        def call(_: Tensor, *rest: Any, _this: LayerCall | None = this, **named: Any) -> Any:
            if first:
                return layer(first.pop(), *rest, **named)
            with nullcontext() if results is None else results.suspend():
                states = kept.get().requires_grad_(needs_gradient)
            return layer(states, *rest, **named)

        # From this empty tensor torch reads the device whose RNG and autocast state to restore.
        device = x.new_empty(0)
        del x
        rest = given[1:]
        del given
        found = checkpoint(call, device, *rest, use_reentrant=False, **contexts, **options)
        self._before = None
        if this is not None:
            this.returned(found)
            self._before = weakref.ref(this)
        return found

    def _keep_input(self, place: str, group: Any, x: Tensor) -> Any:
        """Keeps a layer's input, the hidden states x [B, S, E], for the backward.

        Returns:
            An object whose `get` returns x in the backward.
        """
        if place == RECOMPUTE:
            before = None if self._before is None else self._before()
            if before is not None and before.made(x):
                return before
            # No graph holds the call of a layer whose output needs no gradient.
            is_frozen = before is None and not x.requires_grad
            if not self._warned and not is_frozen:
                self._warned = True
                warn_caller(
                    "the input of a layer stays on the GPU, since it is not the output of the "
                    "layer before: this model changes it in between. Set memory.segment_layers=1."
                )
        if place != HOST:
            return OnDevice(x)
        assert self.store is not None
        return self.store.put(x, INPUT, group, x.shape[:-1].numel())

    def _require_operators(self) -> None:
        """Raises ValueError unless the model uses lctrain's attention.

        No other attention's outputs can be kept for the backward. A model that passed once is not
        checked again.
        """
        if not any(map(is_patched, self._model.modules())):
            raise ValueError(
                "memory must recompute the attention of a model that is not patched, got "
                "keep_attention, host_attention or reuse_attention above 0: only lctrain's "
                "attention can be kept. Choose attention=flash (lctrain.patch_model), or set them "
                "to 0."
            )
        self._has_operators = True

    def _keep_result(self, place: str, group: Any, tokens: int, x: Tensor) -> Any:
        if place != HOST or self.store is None:
            return OnDevice(x)
        return self.store.put(x, f"{ATTENTION} {x.dim()}", group, tokens)


def _run_rebuilt(layer: Callable[..., Any], by_head: bool, *given: Any, **options: Any) -> Any:
    """Runs a layer, whose attention's backward may overwrite the rebuilt queries, keys and values.

    Args:
        layer: The layer's forward.
        by_head: Whether that backward computes one key/value head at a time.
        *given: Positional arguments of the layer.
        **options: Keyword arguments of the layer.
    """
    with inputs_rebuilt(), backward_by_head() if by_head else nullcontext():
        return layer(*given, **options)


@torch.compiler.disable(reason="memory=offload and kept attention need a model as it is")
def _refuse_compilation() -> None:
    """Raises the ValueError for a policy that torch.compile cannot trace."""
    raise ValueError(REFUSED)


def is_traceable(policies: Sequence[LayerPolicy], by_head: bool) -> bool:
    """Returns whether torch.compile can trace layers with these policies.

    Args:
        policies: LayerPolicy of every layer; empty if no layer is checkpointed.
        by_head: Whether attention's backward computes one key/value head at a time.
    """
    return not by_head and all(policy == LayerPolicy() for policy in policies)


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
