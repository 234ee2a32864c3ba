"""EncoderLayer: the mixin that runs a layer of BERT as one autograd function, where it can."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lctrain.attention.boundaries import PACK_ARGUMENTS, Boundaries
from lctrain.attention.forward import (
    BOUNDARIES_ARGUMENT,
    dropout_of,
    is_causal_layer,
    spec_of,
)
from lctrain.attention.spec import FlashSpec
from lctrain.models import fused_encoders
from lctrain.models.code import own_forward, same_code
from lctrain.module_hooks import any_global_hooks, has_own_hooks
from lctrain_kernels.backend import select_backend
from lctrain_kernels.fused_backend import FusedCall, fused_backend
from lctrain_kernels.fused_operator import is_unwatched
from lctrain_kernels.options import AttentionOptions, resolve_seed
from lctrain_kernels.pack import PackTensors, TiledPack

_PLAIN = frozenset((Tensor, nn.Parameter))
_READ = frozenset(
    {BOUNDARIES_ARGUMENT, "position_ids", "document_ids", "schedule", "use_cache", *PACK_ARGUMENTS}
)


class EncoderLayer:
    """Mixin for BERT's layers: one autograd function instead of a module per operation.

    The modules inside run one by one if anything must see them (hooks, adapters, autocast,
    torch.compile, a profiler), and with padding.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's output [B, S, E], as the module's own forward does."""
        arguments = block_arguments(self, hidden_states, args, kwargs)
        if arguments is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        from lctrain.models.encoder_block import apply_block

        return apply_block(*arguments)


def is_encoder_layer(module: nn.Module) -> bool:
    """Returns whether a module, its attention and its MLP have the forwards of BERT's."""
    from transformers.models.bert import modeling_bert as bert

    if not same_code(type(module).forward, bert.BertLayer.forward):
        return False
    attention: Any = getattr(module, "attention", None)
    inner = getattr(attention, "self", None)
    pairs = (
        (attention, bert.BertAttention),
        (inner, bert.BertSelfAttention),
        (getattr(attention, "output", None), bert.BertSelfOutput),
        (getattr(module, "intermediate", None), bert.BertIntermediate),
        (getattr(module, "output", None), bert.BertSelfOutput),
    )
    return same_code(
        getattr(type(module), "feed_forward_chunk", None), bert.BertLayer.feed_forward_chunk
    ) and all(
        part is not None and same_code(own_forward(type(part)), known.forward)
        for part, known in pairs
    )


def block_arguments(
    layer: Any, states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Returns the arguments of EncoderBlock for a call of a layer; None if it cannot compute it.

    Args:
        layer: A layer for which `is_encoder_layer` was true.
        states: Hidden states [B, S, E].
        args: Further positional arguments of the layer, the mask first.
        kwargs: Keyword arguments of the layer.
    """
    found = kwargs.get(BOUNDARIES_ARGUMENT)
    if (
        torch.compiler.is_compiling()
        or found is None
        or any(value is not None for value in args[1:])
    ):
        return None
    for name, value in kwargs.items():
        if value is not None and name not in _READ and name != "attention_mask":
            return None
    if layer.chunk_size_feed_forward or not is_unwatched((states,)):
        return None
    parts = LayerParts.of(layer)
    inner = parts.inner
    spec = spec_of(inner, FlashSpec)
    if spec is None or not _is_whole(found, states) or not _is_full(inner, spec):
        return None
    if not parts.are_known() or parts.are_seen():
        return None
    weights = parts.weights()
    if any(type(one) not in _PLAIN or one.dtype != states.dtype for one in weights):
        return None
    if not weights[0].shape == weights[2].shape == weights[4].shape:
        return None
    if not (fused_encoders.is_served(states) and states.is_contiguous()):
        return None
    return _arguments(found, spec, parts, states, weights)


class LayerParts(NamedTuple):
    """The modules inside a layer of BERT.

    Attributes:
        attention: Its attention, with the projection and the LayerNorm after it.
        inner: The attention without that projection.
        first: The projection and the LayerNorm after the attention.
        intermediate: The first linear layer of the MLP, with GELU.
        last: The second linear layer of the MLP, with the LayerNorm after it.
        linears: The six linear layers, in the order of BlockWeights.
        norms: The two LayerNorms.
        dropouts: The dropouts before the two LayerNorms.
    """

    attention: Any
    inner: Any
    first: Any
    intermediate: Any
    last: Any
    linears: tuple[Any, ...]
    norms: tuple[Any, Any]
    dropouts: tuple[Any, Any]

    @classmethod
    def of(cls, layer: nn.Module) -> LayerParts:
        """Returns the parts of a layer for which `is_encoder_layer` was true.

        It reads `_modules`, since nn.Module looks up attributes slowly.
        """
        inside: Any = layer._modules
        attention, intermediate, last = (
            inside[name] for name in ("attention", "intermediate", "output")
        )
        inner, first = attention._modules["self"], attention._modules["output"]
        own, mine, final = inner._modules, first._modules, last._modules
        return cls(
            *(attention, inner, first, intermediate, last),
            (
                *(own["query"], own["key"], own["value"], mine["dense"]),
                *(intermediate._modules["dense"], final["dense"]),
            ),
            (mine["LayerNorm"], final["LayerNorm"]),
            (mine["dropout"], final["dropout"]),
        )

    def are_known(self) -> bool:
        """Returns whether the parts have the classes that EncoderBlock computes."""
        return (
            isinstance(self.first, fused_encoders.AddedNorm)
            and isinstance(self.last, fused_encoders.AddedNorm)
            and isinstance(self.intermediate, fused_encoders.GeluProjection)
            and fused_encoders.is_gelu(self.intermediate.intermediate_act_fn)
            and all(type(linear) is nn.Linear for linear in self.linears)
            and all(isinstance(norm, fused_encoders.EncoderNorm) for norm in self.norms)
            and all(type(dropout) is nn.Dropout for dropout in self.dropouts)
        )

    def are_seen(self) -> bool:
        """Returns whether a hook, or a forward of its own, sees what a part computes."""
        for part in (*self[:5], *self.linears, *self.norms, *self.dropouts):
            if has_own_hooks(part) or "forward" in vars(part):
                return True
        return any_global_hooks()

    def weights(self) -> list[Any]:
        """Returns weights and biases in the order of BlockWeights; None for one that is missing."""
        q, k, v, out, up, down = self.linears
        first, second = self.norms
        ordered = (q, k, v, out, first, up, down, second)
        return [module._parameters.get(name) for module in ordered for name in ("weight", "bias")]


def _arguments(
    found: Boundaries, spec: FlashSpec, parts: LayerParts, states: Tensor, weights: Any
) -> tuple[Any, ...] | None:
    from lctrain.models.encoder_block import block_kernels

    device, dtype, inner = states.device, states.dtype, parts.inner
    head_dim = inner.attention_head_size
    backend = fused_backend("norm", FusedCall(device, dtype, states.shape[-1]))
    if backend != fused_backend("bias_gelu", FusedCall(device, dtype)):
        return None
    probability = _attention_dropout(inner, spec)
    options = _options(
        float(inner.scaling),
        spec.deterministic or torch.are_deterministic_algorithms_enabled(),
        select_backend(device, dtype, spec.backend, head_dim=head_dim),
        probability,
    )
    if probability:
        options = options._replace(dropout_seed=resolve_seed(probability, None, device))
    first, second = parts.norms
    kernels = block_kernels(
        head_dim,
        (first.eps, second.eps),
        tuple([one.p if one.training else 0.0 for one in parts.dropouts]),
        backend,
    )
    pack: PackTensors | TiledPack = found.pack.tensors()
    if options.backend != "pytorch":
        pack = found.pack.tensors().with_tiles(found.pack.total_q, found.pack.total_k)
    return states, pack, options, kernels, *weights


@functools.lru_cache(maxsize=64)
def _options(scale: float, deterministic: bool, backend: str, dropout_p: float) -> AttentionOptions:
    return AttentionOptions(
        scale, deterministic=deterministic, backend=backend, dropout_p=dropout_p
    )


def _is_whole(found: Boundaries, states: Tensor) -> bool:
    """Returns whether the hidden states hold all tokens of the pack, and no padding."""
    rows = (states.shape[0], states.shape[1])
    return (
        found.indices_q is None
        and found.share is None
        and found.prefixes is None
        and found.queries == rows == found.keys
        and found.pack.total_q == rows[0] * rows[1]
        and found.pack.cu_seqlens_q.device == states.device
    )


def _is_full(inner: Any, spec: FlashSpec) -> bool:
    """Returns whether a layer attends to all tokens of a document."""
    return (
        inner.config._attn_implementation == spec.implementation
        and spec.sliding_window is None
        and spec.backend != "hopper"
        and not is_causal_layer(inner, None)
        and inner.attention_head_size % 8 == 0
    )


def _attention_dropout(inner: Any, spec: FlashSpec) -> float:
    """Returns the probability of dropping an attention weight."""
    return dropout_of(inner, spec, inner.dropout.p if inner.training else 0.0)
