"""Fused forwards for encoders: addition with LayerNorm, bias with GELU, and gated MLPs.

`fused.py` builds subclasses of a module's own class and one of these mixins. On a CPU, under
autocast, and for tensors that the kernels cannot read, each forward computes in the same way as the
module's own class: PyTorch's CPU kernels are as fast, and autocast runs LayerNorm in float32.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lctrain.kernels import bias_gelu, fused_add_layer_norm, geglu, layer_norm
from lctrain.models.code import own_forward, same_code
from lctrain.models.fused_modules import is_plain
from lctrain.module_hooks import has_hooks
from lctrain_kernels.autocast import autocast_dtype


class EncoderNorm:
    """Mixin for nn.LayerNorm over the last dimension, in one kernel."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """Returns the normalised input [..., E], as nn.LayerNorm does."""
        if not is_served(input, self.weight):
            return super().forward(input)  # type: ignore[misc]
        return layer_norm(input, self.weight, self.bias, self.eps)


class AddedNorm:
    """Mixin for BERT's output layers: linear layer, dropout, residual addition and LayerNorm."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Returns the layer's output [..., E], as the module's own forward does."""
        self_: Any = self
        states = self_.dropout(self_.dense(hidden_states))
        if not can_add_norm(self_.LayerNorm, states, input_tensor):
            return self_.LayerNorm(states + input_tensor)
        return add_norm(self_.LayerNorm, states, input_tensor)[0]


class GeluProjection:
    """Mixin for the first half of BERT's MLP: a linear layer and GELU."""

    intermediate_act_fn: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns GELU of the projected states [..., I], as the module's own forward does."""
        self_: Any = self
        dense = self_.dense
        fits = type(dense) is nn.Linear and dense.bias is not None and not has_hooks(dense)
        fits = fits and is_gelu(self_.intermediate_act_fn)
        if not fits or not is_served(hidden_states, dense.weight):
            return super().forward(hidden_states)  # type: ignore[misc]
        return bias_gelu(nn.functional.linear(hidden_states, dense.weight), dense.bias)


class GegluMLP:
    """Mixin for ModernBERT's MLP, whose gate and up projections are one linear layer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the MLP's output [..., E], as the module's own forward does."""
        self_: Any = self
        states = self_.Wi(hidden_states)
        if not is_served(states) or not is_gelu(self_.act):
            gate, factor = states.chunk(2, dim=-1)
            return self_.Wo(self_.drop(self_.act(gate) * factor))
        return self_.Wo(self_.drop(geglu(states, approximate="none")))


class AddedNormLayer:
    """Mixin for ModernBERT's layers: fuses the first residual addition with the second norm."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's output [B, S, E], as the module's own forward does."""
        self_: Any = self
        names = ("attention_mask", "position_embeddings")
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        attended, _ = self_.attn(self_.attn_norm(hidden_states), **kwargs)
        if can_add_norm(self_.mlp_norm, attended, hidden_states):
            normalised, hidden_states = add_norm(self_.mlp_norm, attended, hidden_states)
        else:
            hidden_states = hidden_states + attended
            normalised = self_.mlp_norm(hidden_states)
        return hidden_states + self_.mlp(normalised)


def find_mixin(module: nn.Module) -> type | None:
    """Returns the mixin of this file for a module; None if there is none.

    Args:
        module: A module of a transformers model.

    Returns:
        A mixin whose forward has the same results as the module's own.
    """
    from transformers.models.bert.modeling_bert import BertIntermediate, BertSelfOutput
    from transformers.models.modernbert import modeling_modernbert

    if type(module) is nn.LayerNorm:
        one = len(module.normalized_shape) == 1 and module.weight is not None
        return EncoderNorm if one else None
    if same_code(type(module).forward, modeling_modernbert.ModernBertEncoderLayer.forward):
        return AddedNormLayer
    forward = own_forward(type(module))
    if forward is None:
        return None
    if same_code(forward, BertSelfOutput.forward):
        return AddedNorm
    if same_code(forward, BertIntermediate.forward):
        return GeluProjection if is_gelu(getattr(module, "intermediate_act_fn", None)) else None
    if same_code(forward, modeling_modernbert.ModernBertMLP.forward):
        return GegluMLP if is_gelu(module.act) else None
    return None


def is_gelu(function: Any) -> bool:
    """Returns whether an activation is transformers' or torch's exact GELU, without hooks."""
    from transformers.activations import GELUActivation

    exact = function is nn.functional.gelu
    if type(function) is nn.GELU:
        exact = function.approximate == "none"
    elif type(function) is GELUActivation:
        exact = function.act is nn.functional.gelu
    return exact and not has_hooks(function)


def add_norm(norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (LayerNorm of x + residual, x + residual), both [..., E]."""
    return fused_add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)


def can_add_norm(norm: Any, x: Tensor, residual: Tensor) -> bool:
    """Returns whether one kernel can compute a LayerNorm and the addition before it."""
    return (
        isinstance(norm, EncoderNorm)
        and not has_hooks(norm)
        and x.dtype == residual.dtype
        and is_served(x, residual, norm.weight)
    )


def is_served(*tensors: Tensor) -> bool:
    """Returns whether the kernels of this file support these tensors."""
    device = tensors[0].device.type
    return device in SERVED and is_plain(*tensors) and autocast_dtype(device) is None


SERVED = frozenset({"cuda"})
"""Device types on which the fused kernels run. torch.compile and tests see the same set."""
