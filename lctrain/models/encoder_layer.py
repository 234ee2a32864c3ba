"""EncoderLayer: the mixin that runs a layer of BERT as one autograd function, where it can."""

from __future__ import annotations

from typing import Any

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
from lctrain.models.fused_modules import has_hooks
from lctrain_kernels.backend import select_backend
from lctrain_kernels.fused_backend import FusedCall, fused_backend
from lctrain_kernels.fused_operator import is_unwatched
from lctrain_kernels.options import AttentionOptions

_READ = frozenset(
    {BOUNDARIES_ARGUMENT, "position_ids", "document_ids", "schedule", "use_cache", *PACK_ARGUMENTS}
)


class EncoderLayer:
    """Mixin for BERT's layers: one autograd function instead of a module per operation.

    The modules inside run one by one if anything must see them (hooks, adapters, autocast,
    torch.compile, a profiler), with active dropout, and with padding.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's output [B, S, E], as the module's own forward does."""
        arguments = block_arguments(self, hidden_states, args, kwargs)
        if arguments is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        from lctrain.models.encoder_block import EncoderBlock

        return EncoderBlock.apply(*arguments)


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
    attention, intermediate, last = layer.attention, layer.intermediate, layer.output
    inner, first = attention.self, attention.output
    spec = spec_of(inner, FlashSpec)
    if spec is None or not _is_whole(found, states) or not _is_full(inner, spec):
        return None
    linears = (
        *(inner.query, inner.key, inner.value, first.dense),
        *(intermediate.dense, last.dense),
    )
    norms, dropouts = (first.LayerNorm, last.LayerNorm), (first.dropout, last.dropout)
    if not (
        isinstance(first, fused_encoders.AddedNorm)
        and isinstance(last, fused_encoders.AddedNorm)
        and isinstance(intermediate, fused_encoders.GeluProjection)
        and all(type(linear) is nn.Linear for linear in linears)
        and all(isinstance(norm, fused_encoders.EncoderNorm) for norm in norms)
        and all(type(one) is nn.Dropout and not (one.training and one.p) for one in dropouts)
    ):
        return None
    for module in (attention, inner, first, intermediate, last, *linears, *norms, *dropouts):
        if has_hooks(module) or "forward" in vars(module):
            return None
    q, k, v, out, up, down = linears
    ordered = (q, k, v, out, norms[0], up, down, norms[1])
    weights = [tensor for module in ordered for tensor in (module.weight, module.bias)]
    if any(tensor is None or tensor.dtype != states.dtype for tensor in weights):
        return None
    if not (fused_encoders.is_served(states, *weights) and states.is_contiguous()):
        return None
    return _arguments(found, spec, inner, states, norms, weights)


def _arguments(
    found: Boundaries, spec: FlashSpec, inner: Any, states: Tensor, norms: Any, weights: Any
) -> tuple[Any, ...] | None:
    from lctrain.models.encoder_block import BlockOptions

    device, dtype, head_dim = states.device, states.dtype, inner.attention_head_size
    backend = fused_backend("norm", FusedCall(device, dtype, states.shape[-1]))
    if backend != fused_backend("bias_gelu", FusedCall(device, dtype)):
        return None
    options = AttentionOptions(
        softmax_scale=float(inner.scaling),
        deterministic=spec.deterministic or torch.are_deterministic_algorithms_enabled(),
        backend=select_backend(device, dtype, spec.backend, head_dim=head_dim),
    )
    block = BlockOptions(head_dim, float(norms[0].eps), float(norms[1].eps), backend)
    return states, found.pack.tensors(), options, block, *weights


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
    """Returns whether a layer attends to all tokens of a document, without dropout."""
    return (
        inner.config._attn_implementation == spec.implementation
        and spec.sliding_window is None
        and spec.backend != "hopper"
        and not is_causal_layer(inner, None)
        and dropout_of(inner, spec, inner.dropout.p if inner.training else 0.0) == 0
        and inner.attention_head_size % 8 == 0
    )
