"""EncoderBlock: a layer of BERT as one autograd function.

A layer of BERT has ten operations with about sixty nodes of autograd. On small batches the host
needs more time for them than the GPU. The function here runs the same kernels and matrix products
with one node, and adds the gradients of the layer's input inside the matrix products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lctrain_kernels.fused_operator import first_derivative_only
from lctrain_kernels.mlp.operators import bias_activation, bias_activation_backward
from lctrain_kernels.norm.operators import flat_rows, like, norm, norm_backward
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import PackTensors
from lctrain_kernels.varlen.operators import varlen_attention


class BlockWeights(NamedTuple):
    """Weights and biases of a layer with hidden size E and inner size I.

    Attributes:
        query: [E, E].
        query_bias: [E].
        key: [E, E].
        key_bias: [E].
        value: [E, E].
        value_bias: [E].
        output: Projection after the attention, [E, E].
        output_bias: [E].
        first_norm: LayerNorm after the attention, [E].
        first_norm_bias: [E].
        inner: First linear layer of the MLP, [I, E].
        inner_bias: [I].
        outer: Second linear layer of the MLP, [E, I].
        outer_bias: [E].
        second_norm: LayerNorm after the MLP, [E].
        second_norm_bias: [E].
    """

    query: Tensor
    query_bias: Tensor
    key: Tensor
    key_bias: Tensor
    value: Tensor
    value_bias: Tensor
    output: Tensor
    output_bias: Tensor
    first_norm: Tensor
    first_norm_bias: Tensor
    inner: Tensor
    inner_bias: Tensor
    outer: Tensor
    outer_bias: Tensor
    second_norm: Tensor
    second_norm_bias: Tensor


class BlockOptions(NamedTuple):
    """Numbers of a layer that are no tensors.

    Attributes:
        head_dim: Columns of a head.
        first_eps: Epsilon of the LayerNorm after the attention.
        second_eps: Epsilon of the LayerNorm after the MLP.
        backend: Backend of norms and GELU, "triton" or "pytorch".
    """

    head_dim: int
    first_eps: float
    second_eps: float
    backend: str

    def norm(self, eps: float) -> tuple[float, float, bool, bool, str]:
        """Returns the options of a LayerNorm in the order of the operator's arguments."""
        return eps, 0.0, False, True, self.backend


class EncoderBlock(torch.autograd.Function):
    """Computes a layer of BERT without dropout, for tokens without padding.

    Arguments of `apply` are the hidden states [..., E] of T tokens, the pack's PackTensors, the
    AttentionOptions, the BlockOptions, and the fields of BlockWeights one by one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        pack: PackTensors,
        attention: AttentionOptions,
        options: BlockOptions,
        *weights: Tensor,
    ) -> Tensor:
        """Returns the layer's output in the shape of the hidden states."""
        w, x = BlockWeights(*weights), flat_rows(states)
        heads = (x.shape[0], -1, options.head_dim)
        q = linear(x, w.query, w.query_bias).view(heads)
        k = linear(x, w.key, w.key_bias).view(heads)
        v = linear(x, w.value, w.value_bias).view(heads)
        out, lse = varlen_attention.forward(q, k, v, *pack, *attention)
        projected = linear(flat_heads(out), w.output, w.output_bias)
        first = options.norm(options.first_eps)
        middle, sum1, mean1, rstd1 = norm(projected, x, w.first_norm, w.first_norm_bias, *first)
        inner = linear(middle, w.inner)
        active = bias_activation(inner, w.inner_bias, "gelu", options.backend)
        projected = linear(active, w.outer, w.outer_bias)
        second = options.norm(options.second_eps)
        y, sum2, mean2, rstd2 = norm(projected, middle, w.second_norm, w.second_norm_bias, *second)
        ctx.save_for_backward(
            *(states, q, k, v, out, lse, sum1, mean1, rstd1, middle, inner, active),
            *(sum2, mean2, rstd2, w.query, w.key, w.value, w.output, w.first_norm),
            *(w.inner, w.inner_bias, w.outer, w.second_norm),
        )
        ctx.constants = (pack, attention, options)
        return like(y, states)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the hidden states and of the weights."""
        states, q, k, v, out, lse, sum1, mean1, rstd1, middle, inner, active, *rest = (
            ctx.saved_tensors
        )
        sum2, mean2, rstd2, query, key, value, output, first_norm, *last = rest
        inner_weight, inner_bias, outer, second_norm = last
        pack, attention, options = ctx.constants
        needs_states, _, _, _, *flags = ctx.needs_input_grad
        needs = BlockWeights(*flags)
        x = flat_rows(states)
        dsum, dnorm2, dnorm2_bias = norm_backward(
            *(flat_rows(dy), None, sum2, second_norm, mean2, rstd2),
            *(needs.second_norm, needs.second_norm_bias),
            *options.norm(options.second_eps),
        )
        douter = product(dsum, active, needs.outer, needs.outer_bias)
        dinner, dinner_bias = bias_activation_backward(
            dsum @ outer, inner, inner_bias, "gelu", options.backend
        )
        dmiddle = dsum.addmm_(dinner, inner_weight)
        dinner_weight, _ = product(dinner, middle, needs.inner, False)
        dsum, dnorm1, dnorm1_bias = norm_backward(
            *(dmiddle, None, sum1, first_norm, mean1, rstd1),
            *(needs.first_norm, needs.first_norm_bias),
            *options.norm(options.first_eps),
        )
        doutput = product(dsum, flat_heads(out), needs.output, needs.output_bias)
        dout = (dsum @ output).view(out.shape)
        found = varlen_attention.backward(dout, None, q, k, v, *pack, *attention, out, lse)
        dq, dk, dv = (flat_heads(gradient) for gradient in found[:3])
        dquery = product(dq, x, needs.query, needs.query_bias)
        dkey = product(dk, x, needs.key, needs.key_bias)
        dvalue = product(dv, x, needs.value, needs.value_bias)
        dstates = None
        if needs_states:
            dstates = like(dsum.addmm_(dq, query).addmm_(dk, key).addmm_(dv, value), states)
        return (
            *(dstates, None, None, None),
            *(*dquery, *dkey, *dvalue, *doutput),
            dnorm1 if needs.first_norm else None,
            dnorm1_bias if needs.first_norm_bias else None,
            *(dinner_weight, dinner_bias if needs.inner_bias else None),
            *douter,
            dnorm2 if needs.second_norm else None,
            dnorm2_bias if needs.second_norm_bias else None,
        )


def product(
    gradient: Tensor, x: Tensor, needs_weight: Any, needs_bias: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of a linear layer's weight [N, E] and bias [N], those that are needed.

    Args:
        gradient: Gradient of the layer's output, [T, N].
        x: Input of the layer, [T, E].
        needs_weight: Whether the gradient of the weight is needed.
        needs_bias: Whether the gradient of the bias is needed.
    """
    return gradient.t() @ x if needs_weight else None, gradient.sum(0) if needs_bias else None


def flat_heads(states: Tensor) -> Tensor:
    """Returns states [T, H, D] in contiguous memory as [T, H D]."""
    return states.view(states.shape[0], -1)
