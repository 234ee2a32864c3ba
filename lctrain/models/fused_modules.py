"""Fused forwards for norms, MLPs, decoder layers, q/k/v projections and RoPE.

`fused.py` builds subclasses of a module's own class and one of these mixins. Parameters, state
dicts, hooks and isinstance work as before, and results are equal within rounding. If the kernels
cannot read a module's tensors (a DTensor, for example), the forward computes in the same way as the
module's own class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.kernels import (
    fused_add_rms_norm,
    gated_linear,
    geglu,
    linear_add,
    merged_linear,
    qk_norm_rotary,
    rms_norm,
    rms_norm_residual,
    rotate_qk,
    swiglu,
)
from lctrain.module_hooks import has_hooks
from lctrain_kernels.autocast import autocast_dtype


class LlamaNorm:
    """Mixin for RMSNorms that cast to the input's dtype before they multiply, as Llama's does."""

    weight: Tensor
    variance_epsilon: float

    def norm_options(self) -> dict[str, Any]:
        """Returns the keyword arguments with which `rms_norm` computes this norm."""
        return {"eps": self.variance_epsilon}

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the normalised hidden states [..., E], as the module's own forward does."""
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
        """Returns the normalised x [..., E], as the module's own forward does."""
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
    """Mixin for the norm of queries or keys: `rotate_states` applies the norm later, with RoPE."""

    def forward(self, x: Tensor) -> Any:
        """Returns a PendingNorm of x, [B, S, H, D].

        If the module has hooks, or the kernels cannot read x, the norm is applied immediately.
        """
        if not is_plain(x, self.weight) or has_hooks(self):  # type: ignore[attr-defined]
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
        options.pop("float32_product", None)  # the kernel does not round between its steps
        weights = (q.module.weight, k.module.weight)
        states = (q.x.transpose(1, 2), k.x.transpose(1, 2))
        q, k = qk_norm_rotary(*states, *weights, cos, sin, **options)
        return q.transpose(1, 2), k.transpose(1, 2)
    q, k = (x.finish() if isinstance(x, PendingNorm) else x for x in (q, k))
    if q.dtype != k.dtype:
        k = k.to(q.dtype)
    q, k = rotate_qk(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


class SharedInput:
    """Stands for the hidden states of an attention layer, whose q, k and v are computed together.

    The layer's own forward runs with this object: it reads the shape, and calls `nn.Linear` layers,
    each of which returns its part of one matrix product.

    Attributes:
        shape: Shape of the hidden states, [B, S, E].

    Args:
        x: Hidden states [B, S, E].
        linears: The linear layers. All must satisfy `is_plain_linear`, and no two may share a
            weight.
        joined: Their weights one below the other, for one product; None for one per layer.
    """

    def __init__(
        self, x: Tensor, linears: Sequence[nn.Linear], joined: Tensor | None = None
    ) -> None:
        weights = [linear.weight for linear in linears]
        self.shape = x.shape
        self._outs = dict(zip(map(id, weights), products(x, weights, joined), strict=True))

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Tensor:
        """Replaces a call of torch.nn.functional.linear by the layer's output, computed before.

        Each layer's output can be taken once.
        """
        if function is not torch.nn.functional.linear or len(arguments) != 3:
            raise TypeError(f"hidden states of an attention layer do not serve {function}")
        x, weight, _ = arguments
        return x._outs.pop(id(weight))


def share_input(module: nn.Module, hidden_states: Tensor) -> Any:
    """Returns a SharedInput of an attention layer's hidden states, if its projections support that.

    Otherwise, and inside torch.compile, the hidden states are returned unchanged.

    Args:
        module: Attention layer with q_proj, k_proj and v_proj.
        hidden_states: Hidden states [B, S, E].
    """
    linears = projections(module)
    if torch.compiler.is_compiling() or not is_plain(hidden_states):
        return hidden_states
    if not all(is_plain_linear(linear) for linear in linears):
        return hidden_states
    if len({id(linear.weight) for linear in linears}) < len(linears):
        return hidden_states  # SharedInput stores each output under its weight
    return SharedInput(hidden_states, linears, vars(module).get(JOINED_WEIGHTS))


JOINED_WEIGHTS = "lctrain_joined_weights"
"""Attribute of an attention layer or MLP while generation computes with copies of its weights."""


def projections(module: nn.Module) -> list[Any]:
    """Returns the linear layers on the input of an attention layer or of a gated MLP."""
    names = ("gate_proj", "up_proj") if isinstance(module, GatedMLP) else _ATTENTION_PROJECTIONS
    return [getattr(module, name) for name in names]


_ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def products(x: Tensor, weights: Sequence[Tensor], joined: Tensor | None) -> Sequence[Tensor]:
    """Returns the products of x [..., E] with weights [N_i, E], each [..., N_i].

    Args:
        x: Input of linear layers.
        weights: Their weights.
        joined: The weights one below the other, for one product whose parts are views; or None.
    """
    if joined is None:
        return merged_linear(x, *weights)
    return merged_linear(x, joined)[0].split([len(weight) for weight in weights], -1)


class GatedMLP:
    """Mixin for MLPs with gate, up and down projections, as in Llama and Gemma."""

    fused_activation: str  # name of the activation in `gated_linear`, set per class

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns the MLP's output for x [..., E], as the module's own forward does.

        The forward does not keep activation(gate) * up; the backward computes it again. Under
        activation checkpointing or offloading, the forward keeps it: the checkpoint already
        recomputes it.

        Args:
            x: Hidden states [..., E].
            residual: Residual stream [..., E] to add to the output, or None. Nothing else reads it
                afterwards: without gradients, the output overwrites it.
        """
        self_: Any = self
        if computes_otherwise(self_, self_.act_fn):
            out = super().forward(x)  # type: ignore[misc]
            return out if residual is None else residual + out
        linears = projections(self_)
        if is_plain(x) and all(is_plain_linear(linear) for linear in linears):
            joined = vars(self).get(JOINED_WEIGHTS)
            gate, up = products(x, [linear.weight for linear in linears], joined)
        else:
            gate, up = (linear(x) for linear in linears)
        down = self_.down_proj
        if is_plain(gate, up) and is_plain_linear(down) and not keeps_tensors_elsewhere():
            inside = residual if can_add(gate, residual) else None
            if inside is not None and can_overwrite(inside):
                active = gate_states(gate, up, self.fused_activation)
                return add_product(inside, active, down.weight)
            out = gated_linear(
                gate, up, down.weight, activation=self.fused_activation, residual=inside
            )
            return out if residual is None or inside is not None else residual + out
        states = gate_states(gate, up, self.fused_activation)
        if residual is None:
            return down(states)
        if is_plain(states) and is_plain_linear(down) and can_add(states, residual):
            return linear_add(states, down.weight, residual)
        return residual + down(states)


class PackedMLP:
    """Mixin for MLPs whose gate and up projections are one linear layer, as in Phi3."""

    fused_activation: str  # "silu", "gelu" or "gelu_tanh", set per class

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the MLP's output for hidden states [..., E], as the module's own forward does."""
        self_: Any = self
        states = self_.gate_up_proj(hidden_states)
        if not is_plain(states) or computes_otherwise(self_, self_.activation_fn):
            gate, up = states.chunk(2, dim=-1)
            return self_.down_proj(up * self_.activation_fn(gate))
        return self_.down_proj(gate_states(states, None, self.fused_activation))


class ResidualLayer:
    """Mixin for decoder layers like Llama's: fuses the two residual additions with other kernels.

    The kernel of the second norm does the first addition; the MLP's last matrix product does the
    second one.
    """

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Returns the layer's output [B, S, E], as the module's own forward does."""
        self_: Any = self
        first, norm, mlp = self_.input_layernorm, self_.post_attention_layernorm, self_.mlp
        if is_plain(hidden_states, first.weight) and is_unobserved(first, LlamaNorm):
            normalised, hidden_states = rms_norm_residual(
                hidden_states, first.weight, **first.norm_options()
            )
        else:
            normalised = first(hidden_states)
        attended, _ = self_.self_attn(hidden_states=normalised, **kwargs)
        if is_plain(attended, hidden_states, norm.weight) and is_unobserved(norm, LlamaNorm):
            normalised, residual = fused_add_rms_norm(
                attended, hidden_states, norm.weight, **norm.norm_options()
            )
        else:
            residual = hidden_states + attended
            normalised = norm(residual)
        # The MLP may overwrite the residual stream, which a hook on the norm may have kept.
        if is_unobserved(mlp, GatedMLP) and not has_hooks(norm):
            return mlp(normalised, residual=residual)
        return residual + mlp(normalised)


FUSED_FUNCTION = "lctrain_fused_function"
"""Attribute of a fused MLP: the activation function whose values were recognised."""


def computes_otherwise(mlp: nn.Module, function: Any) -> bool:
    """Returns whether a fused MLP's activation was replaced, or has hooks, since the swap."""
    return function is not vars(mlp)[FUSED_FUNCTION] or has_hooks(function)


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


def add_product(residual: Tensor, states: Tensor, weight: Tensor) -> Tensor:
    """Adds `states @ weight.T` to a residual stream [..., E] in place, and returns it.

    torch.addmm copies the residual stream before it adds to it.

    Args:
        residual: Residual stream in the dtype of states, contiguous.
        states: Input [..., I] of the linear layer.
        weight: Its weight [E, I].
    """
    rows = residual.view(-1, residual.shape[-1])
    torch.addmm(rows, states.reshape(-1, states.shape[-1]), weight.t(), out=rows)
    return residual


def is_plain(*tensors: Tensor) -> bool:
    """Returns whether the kernels can read tensors: no DTensor or other Tensor subclass."""
    return all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)


def keeps_tensors_elsewhere() -> bool:
    """Returns whether activation checkpointing or an offload handles saved tensors now.

    In that case activation(gate) * up is not fused with the projection after it: the checkpoint
    recomputes activation(gate) * up anyway, and fused it would also recompute the projection.
    """
    if torch.compiler.is_compiling():
        return False
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def can_add(states: Tensor, residual: Tensor | None) -> bool:
    """Returns whether a matrix product of `states` can add the residual: both have one dtype.

    Inside torch.compile the addition is left to Inductor.
    """
    if residual is None or not is_plain(residual) or torch.compiler.is_compiling():
        return False
    return residual.dtype == (autocast_dtype(states.device.type) or states.dtype)


def can_overwrite(residual: Tensor) -> bool:
    """Returns whether a product may be added to a residual stream in place: without gradients."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return residual.is_contiguous() and autocast_dtype(residual.device.type) is None


def is_unobserved(module: nn.Module, mixin: type) -> bool:
    """Returns whether a module uses a mixin's forward, and no hook sees its inputs or output."""
    return isinstance(module, mixin) and "forward" not in vars(module) and not has_hooks(module)


def is_plain_linear(module: Any) -> bool:
    """Returns whether a module is an nn.Linear without bias and hooks, with a plain weight."""
    return (
        type(module) is nn.Linear
        and module.bias is None
        and is_plain(module.weight)
        and not has_hooks(module)
        and "forward" not in vars(module)
    )
