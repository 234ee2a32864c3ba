"""Mixins with fused forwards for norms, MLPs, decoder layers and the rotation of queries and keys.

`fused.py` mixes each class into a subclass of the module's own class. Parameters, state dicts,
hooks and isinstance work as before, and results are equal within rounding. If the kernels cannot
read a module's tensors (a DTensor, for example), the forward computes as the module's own class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lctrain.kernels import (
    fused_add_rms_norm,
    gated_linear,
    geglu,
    qk_norm_rotary,
    rms_norm,
    rotate_qk,
    swiglu,
)


class LlamaNorm:
    """Mixin for RMSNorms that round before multiplying by the weight, as Llama's does."""

    weight: Tensor
    variance_epsilon: float

    def norm_options(self) -> dict[str, Any]:
        """Returns the keyword arguments with which `rms_norm` computes this norm."""
        return {"eps": self.variance_epsilon}

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the normalised hidden states, any shape, as the module's own forward does."""
        if not is_plain(hidden_states, self.weight):
            return super().forward(hidden_states)  # type: ignore[misc]
        return rms_norm(hidden_states, self.weight, **self.norm_options())


class GemmaNorm:
    """Mixin for RMSNorms that multiply by 1 + weight in float32, as Gemma's does."""

    weight: Tensor
    eps: float

    def norm_options(self) -> dict[str, Any]:
        """Returns the keyword arguments with which `rms_norm` computes this norm."""
        return {"eps": self.eps, "weight_offset": 1.0, "float32_product": True}

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised x, any shape, as the module's own forward does."""
        if not is_plain(x, self.weight):
            return super().forward(x)  # type: ignore[misc]
        return rms_norm(x, self.weight, **self.norm_options())


class PendingNorm:
    """Queries or keys whose norm is postponed, so that one kernel applies norm and rotation.

    Attributes:
        x: Queries or keys before the norm, [B, S, H, D], or [B, H, S, D] once transposed.
        module: The norm module.
    """

    def __init__(self, x: Tensor, module: Any) -> None:
        self.x = x
        self.module = module

    def transpose(self, first: int, second: int) -> PendingNorm:
        """Transposes two dimensions of x, as Tensor.transpose does. The last one must stay last."""
        return PendingNorm(self.x.transpose(first, second), self.module)

    def finish(self) -> Tensor:
        """Applies the norm, and returns the normalised tensor in the shape of x."""
        return rms_norm(self.x, self.module.weight, **self.module.norm_options())


class DeferredNorm:
    """Mixin for the norm of queries or keys, which postpones the norm to `rotate_states`."""

    def forward(self, x: Tensor) -> Any:
        """Returns a PendingNorm of x, or the normalised x if the kernels cannot read it."""
        if not is_plain(x, self.weight):  # type: ignore[attr-defined]
            return super().forward(x)  # type: ignore[misc]
        return PendingNorm(x, self)


def rotate_states(
    q: Any, k: Any, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by RoPE, after any pending norm; replaces apply_rotary_pos_emb.

    If both norms are pending and have the same options, one kernel applies norms and rotation.

    Args:
        q: Queries [B, Hq, S, D], a tensor or a PendingNorm.
        k: Keys [B, Hk, S, D], a tensor or a PendingNorm.
        cos: Cosines [B or 1, S, R] of the R rotated columns.
        sin: Sines, in the shape of cos.
        unsqueeze_dim: Must be 1, the dimension of the heads.

    Returns:
        The rotated queries and keys, in the shapes of q and k.
    """
    assert unsqueeze_dim == 1, "the attention layers that call this have heads before tokens"
    both = isinstance(q, PendingNorm) and isinstance(k, PendingNorm)
    if both and q.module.norm_options() == k.module.norm_options():
        options = q.module.norm_options()
        options.pop("float32_product", None)  # nothing is rounded in between
        weights = (q.module.weight, k.module.weight)
        states = (q.x.transpose(1, 2), k.x.transpose(1, 2))
        q, k = qk_norm_rotary(*states, *weights, cos, sin, **options)
        return q.transpose(1, 2), k.transpose(1, 2)
    q, k = (x.finish() if isinstance(x, PendingNorm) else x for x in (q, k))
    if q.dtype != k.dtype:
        k = k.to(q.dtype)
    q, k = rotate_qk(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


class GatedMLP:
    """Mixin for MLPs with gate, up and down projections, as in Llama and Gemma."""

    fused_activation: str  # name of the activation in `gated_linear`, set per class

    def forward(self, x: Tensor) -> Tensor:
        """Returns the MLP's output for x [..., E], as the module's own forward does.

        The forward does not keep activation(gate) * up; the backward computes it again. Under
        activation checkpointing or offloading, the forward keeps it.
        """
        self_: Any = self
        gate, up = self_.gate_proj(x), self_.up_proj(x)
        down = self_.down_proj
        if is_plain(gate, up) and is_plain_linear(down) and not keeps_tensors_elsewhere():
            return gated_linear(gate, up, down.weight, activation=self.fused_activation)
        return down(gate_states(gate, up, self.fused_activation))


class PackedMLP:
    """Mixin for MLPs with gate and up in one projection, as in Phi3."""

    fused_activation: str  # "silu", "gelu" or "gelu_tanh", set per class

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the MLP's output for hidden states [..., E], as the module's own forward does."""
        self_: Any = self
        states = self_.gate_up_proj(hidden_states)
        if not is_plain(states):
            gate, up = states.chunk(2, dim=-1)
            return self_.down_proj(up * self_.activation_fn(gate))
        return self_.down_proj(gate_states(states, None, self.fused_activation))


class ResidualLayer:
    """Mixin for Llama's decoder layers, which fuses the first residual addition and second norm."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Returns the layer's output [B, S, E], as the module's own forward does."""
        self_: Any = self
        attended, _ = self_.self_attn(hidden_states=self_.input_layernorm(hidden_states), **kwargs)
        norm = self_.post_attention_layernorm
        if is_plain(attended, hidden_states, norm.weight) and isinstance(norm, LlamaNorm):
            normalised, residual = fused_add_rms_norm(
                attended, hidden_states, norm.weight, **norm.norm_options()
            )
        else:
            residual = hidden_states + attended
            normalised = norm(residual)
        return residual + self_.mlp(normalised)


def gate_states(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """Returns activation(gate) * up.

    Args:
        gate: [..., I]; if `up` is None, [..., 2 I] with gate and up concatenated.
        up: [..., I], or None.
        activation: "silu", "gelu" or "gelu_tanh".
    """
    if activation == "silu":
        return swiglu(gate, up)
    return geglu(gate, up, approximate="tanh" if activation == "gelu_tanh" else "none")


def is_plain(*tensors: Tensor) -> bool:
    """Returns whether the kernels can read tensors: no DTensors and no other Tensor subclasses."""
    return all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)


def keeps_tensors_elsewhere() -> bool:
    """Returns whether activation checkpointing or an offload handles the tensors for the backward.

    A checkpoint recomputes activation(gate) * up itself. Fused with the projection after it, the
    checkpoint would recompute that projection too.
    """
    if torch.compiler.is_compiling():
        return False
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def is_plain_linear(module: Any) -> bool:
    """Returns whether a module is an nn.Linear without bias and hooks, on a weight for kernels."""
    return (
        type(module) is nn.Linear
        and module.bias is None
        and is_plain(module.weight)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
    )
