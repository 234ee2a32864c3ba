"""Forwards of the modules that fused=True swaps: same parameters, same result, fewer passes.

Each is mixed into a subclass of the module's own class (`fused.py`), so that isinstance, names of
parameters, hooks and checkpoints see what they saw. Where a module is not plain any more (an
adapter, a distributed tensor), the class's own forward runs.
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
    """RMSNorm that rounds before its product, as in Llama."""

    weight: Tensor
    variance_epsilon: float

    def norm_options(self) -> dict[str, Any]:
        """Keyword arguments of `rms_norm`."""
        return {"eps": self.variance_epsilon}

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the class that this is mixed into."""
        if not is_plain(hidden_states, self.weight):
            return super().forward(hidden_states)  # type: ignore[misc]
        return rms_norm(hidden_states, self.weight, **self.norm_options())


class GemmaNorm:
    """RMSNorm with an offset of 1 and a product in float32, as in Gemma."""

    weight: Tensor
    eps: float

    def norm_options(self) -> dict[str, Any]:
        """Keyword arguments of `rms_norm`."""
        return {"eps": self.eps, "weight_offset": 1.0, "float32_product": True}

    def forward(self, x: Tensor) -> Tensor:
        """As the class that this is mixed into."""
        if not is_plain(x, self.weight):
            return super().forward(x)  # type: ignore[misc]
        return rms_norm(x, self.weight, **self.norm_options())


class PendingNorm:
    """A tensor whose norm waits for the rotation that follows it in the attention's forward.

    Attributes:
        x: [B, S, H, D], or [B, H, S, D] once transposed.
        module: The norm.
    """

    def __init__(self, x: Tensor, module: Any) -> None:
        self.x = x
        self.module = module

    def transpose(self, first: int, second: int) -> PendingNorm:
        """Transposes two dimensions as a tensor does; the norm is over the last dimension."""
        return PendingNorm(self.x.transpose(first, second), self.module)

    def finish(self) -> Tensor:
        """Returns the normalised tensor, if it is not rotated."""
        return rms_norm(self.x, self.module.weight, **self.module.norm_options())


class DeferredNorm:
    """The norm of queries or keys, which the fused rotation applies."""

    def forward(self, x: Tensor) -> Any:
        """Returns a PendingNorm where the rotation can apply it."""
        if not is_plain(x, self.weight):  # type: ignore[attr-defined]
            return super().forward(x)  # type: ignore[misc]
        return PendingNorm(x, self)


def rotate_states(
    q: Any, k: Any, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Replaces transformers' apply_rotary_pos_emb; applies pending norms in the same pass.

    Args:
        q: [B, Hq, S, D], a tensor or a PendingNorm of one.
        k: [B, Hk, S, D], a tensor or a PendingNorm of one.
        cos: [B or 1, S, R].
        sin: Sine, in the shape of cos.
        unsqueeze_dim: Must be 1, the dimension of the heads.
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
    """Gate, up and down projections, as in Llama and Gemma."""

    fused_activation: str  # of `gated_linear`; set per class

    def forward(self, x: Tensor) -> Tensor:
        """As the class that this is mixed into; the product of gate and up is not kept."""
        self_: Any = self
        gate, up = self_.gate_proj(x), self_.up_proj(x)
        down = self_.down_proj
        if is_plain(gate, up) and is_plain_linear(down) and not keeps_tensors_elsewhere():
            return gated_linear(gate, up, down.weight, activation=self.fused_activation)
        return down(gate_states(gate, up, self.fused_activation))


class PackedMLP:
    """Gate and up in one projection, as in Phi3."""

    fused_activation: str

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the class that this is mixed into."""
        self_: Any = self
        states = self_.gate_up_proj(hidden_states)
        if not is_plain(states):
            gate, up = states.chunk(2, dim=-1)
            return self_.down_proj(up * self_.activation_fn(gate))
        return self_.down_proj(gate_states(states, None, self.fused_activation))


class ResidualLayer:
    """A decoder layer whose second norm takes the residual addition along, as in Llama."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """As the class that this is mixed into."""
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
    """Returns activation(gate) * up; without `up`, `gate` holds both side by side."""
    if activation == "silu":
        return swiglu(gate, up)
    return geglu(gate, up, approximate="tanh" if activation == "gelu_tanh" else "none")


def is_plain(*tensors: Tensor) -> bool:
    """Whether the kernels can read these: plain tensors, not distributed or wrapped ones."""
    return all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)


def keeps_tensors_elsewhere() -> bool:
    """Whether someone decides what the backward keeps: a checkpoint, or an offload.

    A checkpoint computes the product again anyway, and stops before the projection that follows it:
    one matrix product less than if both were one operation.
    """
    if torch.compiler.is_compiling():
        return False
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def is_plain_linear(module: Any) -> bool:
    """Returns whether a module only multiplies by its weight."""
    return (
        type(module) is nn.Linear
        and module.bias is None
        and is_plain(module.weight)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
    )
