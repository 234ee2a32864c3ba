"""EncoderBlock: a layer of BERT as one autograd function.

A layer of BERT has ten operations with about sixty nodes of autograd. On small batches the host
needs more time for them than the GPU. The function here runs the same kernels with one node. Query,
key and value are one matrix product, and so are the gradients of their weights and of their input.

The layer's caller has checked that nothing watches operators, so the implementations are called
without `Operation`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lctrain_kernels.fused_operator import first_derivative_only
from lctrain_kernels.norm.operators import flat_rows, like
from lctrain_kernels.norm.options import NormOptions
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import PackTensors, TiledPack
from lctrain_kernels.registry import BACKWARD, FORWARD, Run, choose, implementation
from lctrain_kernels.varlen.operators import Operands


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


class BlockKernels(NamedTuple):
    """Numbers of a layer that are no tensors, and the implementations of its operations.

    Attributes:
        head_dim: Columns of a head.
        first: Options of the LayerNorm after the attention.
        second: Options of the LayerNorm after the MLP.
        dropouts: Probabilities of the dropout before the first and the second LayerNorm.
        norm: Forward of LayerNorm.
        norm_backward: Backward of LayerNorm.
        gelu: Forward of bias and GELU.
        gelu_backward: Backward of bias and GELU.
    """

    head_dim: int
    first: NormOptions
    second: NormOptions
    dropouts: tuple[float, float]
    norm: Run
    norm_backward: Run
    gelu: Run
    gelu_backward: Run


@functools.lru_cache(maxsize=64)
def block_kernels(
    head_dim: int, epsilons: tuple[float, float], dropouts: tuple[float, float], backend: str
) -> BlockKernels:
    """Returns the BlockKernels of a layer.

    Args:
        head_dim: Columns of a head.
        epsilons: Epsilons of the two LayerNorms.
        dropouts: Probabilities of the dropout before the two LayerNorms.
        backend: Backend of norms and GELU, "triton" or "pytorch".
    """
    first, second = (NormOptions(eps, centered=True) for eps in epsilons)
    return BlockKernels(
        head_dim,
        first,
        second,
        dropouts,
        implementation("norm", FORWARD, backend),
        implementation("norm", BACKWARD, backend),
        implementation("bias_gelu", FORWARD, backend),
        implementation("bias_gelu", BACKWARD, backend),
    )


class EncoderBlock(torch.autograd.Function):
    """Computes a layer of BERT for tokens without padding.

    Arguments of `apply` are the hidden states [..., E] of T tokens, the PackTensors or TiledPack of
    their documents, the AttentionOptions, the BlockKernels, and the fields of BlockWeights one by
    one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        pack: PackTensors | TiledPack,
        attention: AttentionOptions,
        kernels: BlockKernels,
        *weights: Tensor,
    ) -> Tensor:
        """Returns the layer's output in the shape of the hidden states."""
        w, x = BlockWeights(*weights), flat_rows(states)
        merged_weight = torch.cat((w.query, w.key, w.value))
        merged_bias = torch.cat((w.query_bias, w.key_bias, w.value_bias))
        merged = torch.addmm(merged_bias, x, merged_weight.t())  # [T, 3 E]
        operands = heads_of(merged, kernels.head_dim)
        run = choose("varlen", FORWARD, operands, attention).run
        out, lse = run(operands, pack, attention)
        projected = torch.addmm(w.output_bias, flat_heads(out), w.output.t())
        projected, kept1 = drop(projected, kernels.dropouts[0])
        middle, sum1, mean1, rstd1 = kernels.norm(
            projected, x, w.first_norm, w.first_norm_bias, kernels.first
        )
        inner = middle @ w.inner.t()
        active = kernels.gelu(inner, w.inner_bias, "gelu")
        projected = torch.addmm(w.outer_bias, active, w.outer.t())
        projected, kept2 = drop(projected, kernels.dropouts[1])
        y, sum2, mean2, rstd2 = kernels.norm(
            projected, middle, w.second_norm, w.second_norm_bias, kernels.second
        )
        ctx.save_for_backward(
            *(x, merged, out, lse, sum1, mean1, rstd1, middle, inner, active, sum2, mean2, rstd2),
            *(kept1, kept2, merged_weight, w.output, w.first_norm),
            *(w.inner, w.inner_bias, w.outer, w.second_norm),
        )
        ctx.constants = (pack, attention, kernels)
        return like(y, states)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the hidden states and of the weights."""
        x, merged, out, lse, sum1, mean1, rstd1, middle, inner, active, *rest = ctx.saved_tensors
        sum2, mean2, rstd2, kept1, kept2, merged_weight, output, first_norm, *last = rest
        inner_weight, inner_bias, outer, second_norm = last
        pack, attention, kernels = ctx.constants
        needs_states, _, _, _, *flags = ctx.needs_input_grad
        needs = BlockWeights(*flags)
        dsum, dnorm2, dnorm2_bias = kernels.norm_backward(
            *(flat_rows(dy), None, sum2, second_norm, mean2, rstd2, kernels.second),
            *(needs.second_norm, needs.second_norm_bias),
        )
        dprojected = drop_backward(dsum, kept2, kernels.dropouts[1])
        douter = product(dprojected, active, needs.outer, needs.outer_bias)
        dinner, dinner_bias = kernels.gelu_backward(dprojected @ outer, inner, inner_bias, "gelu")
        dmiddle = dsum.addmm_(dinner, inner_weight)
        dinner_weight, _ = product(dinner, middle, needs.inner, False)
        dsum, dnorm1, dnorm1_bias = kernels.norm_backward(
            *(dmiddle, None, sum1, first_norm, mean1, rstd1, kernels.first),
            *(needs.first_norm, needs.first_norm_bias),
        )
        dprojected = drop_backward(dsum, kept1, kernels.dropouts[0])
        doutput = product(dprojected, flat_heads(out), needs.output, needs.output_bias)
        dout = (dprojected @ output).view(out.shape)
        operands = heads_of(merged, kernels.head_dim)
        run = choose("varlen", BACKWARD, operands, attention, dout).run
        found = run((dout, None), operands, (out, lse), pack, attention)
        dmerged = torch.cat([flat_heads(gradient) for gradient in found[:3]], 1)  # [T, 3 E]
        dweights, dbiases = product(dmerged, x, any(flags[0:6:2]), any(flags[1:6:2]))
        dstates = None
        if needs_states:
            dstates = dsum.addmm_(dmerged, merged_weight).view(dy.shape)
        return (
            *(dstates, None, None, None),
            *thirds(dweights, dbiases, flags),
            *doutput,
            dnorm1 if needs.first_norm else None,
            dnorm1_bias if needs.first_norm_bias else None,
            *(dinner_weight, dinner_bias if needs.inner_bias else None),
            *douter,
            dnorm2 if needs.second_norm else None,
            dnorm2_bias if needs.second_norm_bias else None,
        )


apply_block = super(torch.autograd.Function, EncoderBlock).apply  # type: ignore[misc]
"""EncoderBlock.apply without the search for functorch, which `is_unwatched` has done."""


def heads_of(merged: Tensor, head_dim: int) -> Operands:
    """Returns queries, keys and values [T, H, D], views of [T, 3 H D]."""
    tokens, columns = merged.shape
    return Operands(*merged.view(tokens, 3, columns // (3 * head_dim), head_dim).unbind(1))


def flat_heads(states: Tensor) -> Tensor:
    """Returns states [T, H, D] in contiguous memory as [T, H D]."""
    return states.flatten(1)


def drop(x: Tensor, probability: float) -> tuple[Tensor, Tensor | None]:
    """Returns x after dropout and the mask of what is kept; x and None if nothing is dropped."""
    if probability == 0:
        return x, None
    dropped, kept = torch.native_dropout(x, probability, True)
    return dropped, kept


def drop_backward(gradient: Tensor, kept: Tensor | None, probability: float) -> Tensor:
    """Returns the gradient of the input of `drop`; a gradient [T, E] itself without dropout."""
    if kept is None:
        return gradient
    scale = 0.0 if probability == 1 else 1 / (1 - probability)
    return torch.ops.aten.native_dropout_backward(gradient, kept, scale)  # type: ignore[no-any-return]


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


def thirds(
    dweights: Tensor | None, dbiases: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of query, key and value: weight and bias of each, those needed.

    Args:
        dweights: [3 E, E], or None if no weight needs a gradient.
        dbiases: [3 E], or None if no bias needs a gradient.
        needs: Whether each of the results is needed; further items are not read.
    """
    weights = (None,) * 3 if dweights is None else dweights.chunk(3)
    biases = (None,) * 3 if dbiases is None else dbiases.chunk(3)
    pairs = [one for pair in zip(weights, biases, strict=True) for one in pair]
    return tuple(one if needed else None for one, needed in zip(pairs, needs, strict=False))
