"""Registers the linear cross-entropy as torch.library operators.

`linear_cross_entropy_sum` computes the gradients of the summed loss in the forward; its backward
scales them by the upstream gradient. A chunk takes three matrix products: logits, gradient of
hidden states, gradient of the weight. It takes two if the weight is frozen, and one without
gradients.

`linear_cross_entropy_tokens` returns one loss per token. The upstream gradients of the tokens are
known in the backward only, so its backward computes the logits again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lctrain_kernels.cross_entropy.options import SCHEMA, LossOptions
from lctrain_kernels.cross_entropy.products import (
    accumulate_outer,
    logits_buffer,
    project,
    project_back,
)
from lctrain_kernels.cross_entropy.rows import (
    new_statistics,
    row_pass,
    scale_to,
    token_losses,
)
from lctrain_kernels.cross_entropy.shard import reduce_statistics
from lctrain_kernels.fused_operator import define_autograd, define_operator

_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? adapter_hidden, Tensor? adapter_weight, "
    "Tensor labels"
)
_NEEDS = "bool[] needs"
NUM_GRADS = 5
"""Gradients of hidden, weight, bias, adapter_hidden and adapter_weight."""


class _Gradients:
    """Gradients of the loss by its inputs, which are filled chunk by chunk.

    The inputs are hidden [T, E], weight [V, E], bias [V], and both matrices of the adapter. A
    gradient that is not needed is an empty tensor.
    """

    def __init__(
        self,
        inputs: list[Tensor | None],
        needs: list[bool],
        dtype: torch.dtype,
    ) -> None:
        self.needs = [bool(need) for need in needs]
        self.tensors = [
            _empty_like(tensor, place, need, dtype)
            for place, (tensor, need) in enumerate(zip(inputs, self.needs, strict=True))
        ]

    def without_tokens(self) -> None:
        """Sets the gradients that are sums over tokens to 0, for a batch without tokens."""
        for place in (1, 2, 4):
            self.tensors[place].zero_()

    def add(
        self,
        chunk: slice,
        logits_grad: Tensor,
        parts: tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None],
        ignored: Tensor,
    ) -> None:
        """Adds the contribution of one chunk of C tokens to `self.tensors`, in place.

        Call it chunk by chunk from the first token on: the first chunk overwrites the gradients.

        Args:
            chunk: Slice of the tokens.
            logits_grad: Gradient of the chunk's logits, [C, V].
            parts: What the chunk's logits were computed from, as `_chunks` yields it: hidden states
                [C, E], weight [V, E], and the adapter (low [C, R], up [V, R]) or None.
            ignored: Which of the chunk's tokens are ignored, [C] bool. Their hidden states may be
                NaN, so they are replaced by 0 before the products.
        """
        hidden, weight, adapter = parts
        first = chunk.start == 0
        grads = self.tensors
        if self.needs[0]:
            project_back(logits_grad, weight, grads[0][chunk])
        if self.needs[1]:
            # The hidden state of an ignored token may be NaN; 0 * NaN must not reach the weight.
            kept = hidden.masked_fill(ignored[:, None], 0.0)
            accumulate_outer(grads[1], logits_grad, kept, first=first)
        if self.needs[2]:
            total = logits_grad.sum(dim=0, dtype=grads[2].dtype)
            grads[2].copy_(total if first else grads[2] + total)
        if adapter is None:
            return
        low, up = adapter
        if self.needs[3]:
            project_back(logits_grad, up.to(low.dtype), grads[3][chunk])
        if self.needs[4]:
            kept = low.masked_fill(ignored[:, None], 0.0)
            accumulate_outer(grads[4], logits_grad, kept, first=first)


def _empty_like(tensor: Tensor | None, place: int, needed: bool, dtype: torch.dtype) -> Tensor:
    """Allocates the gradient of input number `place`; an empty tensor if it is not needed.

    Gradients per token (of hidden states) have the dtype of the input. Gradients that are sums over
    tokens (of weights and bias) have `dtype`.
    """
    if tensor is None or not needed:
        return torch.empty(0)
    if place in (0, 3):
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    # The first chunk overwrites a sum, so it need not be zeroed here.
    return tensor.new_empty(tensor.shape, dtype=dtype)


def _sum_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter_hidden: Tensor | None,
    adapter_weight: Tensor | None,
    labels: Tensor,
    token_weights: Tensor | None,
    needs: list[bool],
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Computes the loss, summed over the tokens, and its gradients, chunk by chunk.

    Returns:
        The summed loss, 0-dim, the logsumexp [T], and the gradients of the summed loss by each
        input.
    """
    options = LossOptions(*rest)
    check_label_range(labels, options)
    dtype = accumulation_dtype(options.matmul_dtype, hidden)
    inputs = [hidden, weight, bias, adapter_hidden, adapter_weight]
    grads = _Gradients(inputs, needs, dtype)
    statistics = new_statistics(hidden.shape[0], dtype, hidden.device, options.batch_invariant)
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk, logits, parts in _chunks(inputs, options):
            split = bool(options.group_name)
            part = statistics[:, chunk]
            factors = None if token_weights is None else token_weights[chunk]
            arguments = (logits, bias, labels[chunk], part, factors, None, options)
            gradient = any(grads.needs)
            row_pass(*arguments, reads_statistics=False, writes_gradient=gradient and not split)
            if split:
                reduce_statistics(part, options.group_name)
            if split and gradient:
                row_pass(*arguments, reads_statistics=True, writes_gradient=True)
            if gradient:
                grads.add(chunk, logits, parts, labels[chunk] == options.ignore_index)
    loss, lse = token_losses(statistics, labels, options)
    if not hidden.shape[0]:
        grads.without_tokens()
    if token_weights is not None:
        # A token of weight 0 adds 0 to the loss, even if its own loss is infinite.
        loss = (loss * token_weights).masked_fill(token_weights == 0.0, 0.0)
        loss = loss.masked_fill(labels == options.ignore_index, 0.0)
    return loss.sum(), lse, *grads.tensors


def _tokens_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter_hidden: Tensor | None,
    adapter_weight: Tensor | None,
    labels: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss [T], the logsumexp [T] and the softmax statistics [4, T] of each token."""
    options = LossOptions(*rest)
    check_label_range(labels, options)
    dtype = accumulation_dtype(options.matmul_dtype, hidden)
    statistics = new_statistics(hidden.shape[0], dtype, hidden.device, options.batch_invariant)
    inputs = [hidden, weight, bias, adapter_hidden, adapter_weight]
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk, logits, _ in _chunks(inputs, options):
            part = statistics[:, chunk]
            row_pass(
                logits, bias, labels[chunk], part, None, None, options,
                reads_statistics=False, writes_gradient=False,
            )  # fmt: skip
            if options.group_name:
                reduce_statistics(part, options.group_name)
    return *token_losses(statistics, labels, options), statistics


def _tokens_backward(
    token_grad: Tensor,
    lse_grad: Tensor | None,
    statistics: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter_hidden: Tensor | None,
    adapter_weight: Tensor | None,
    labels: Tensor,
    needs: list[bool],
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Returns the gradients of the loss operator's inputs.

    They are those of hidden, weight, bias, adapter_hidden and adapter_weight, in this order. An
    entry that `needs` excludes, or whose input is None, is an empty tensor.

    Args:
        token_grad: Gradient of each token's loss, [T].
        lse_grad: Gradient of each token's logsumexp, [T], or None.
        statistics: Statistics of each row from the forward, [4, T]; see row_pass_kernel.
        hidden: Hidden states [T, E].
        weight: Output embedding [V, E].
        bias: Bias of the logits, [V], or None.
        adapter_hidden: Hidden states in the rank of an adapter, [T, r], or None.
        adapter_weight: Weight of that adapter, [V, r], or None.
        labels: Label of each token, [T] int64.
        needs: Which gradients to compute.
        *rest: Fields of LossOptions, in order.
    """
    options = LossOptions(*rest)
    inputs = [hidden, weight, bias, adapter_hidden, adapter_weight]
    grads = _Gradients(inputs, needs, statistics.dtype)
    token_grad = token_grad.contiguous()
    lse_grad = None if lse_grad is None else lse_grad.contiguous()
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk, logits, parts in _chunks(inputs, options):
            row_pass(
                logits,
                bias,
                labels[chunk],
                statistics[:, chunk],
                token_grad[chunk],
                None if lse_grad is None else lse_grad[chunk],
                options,
                reads_statistics=True,
                writes_gradient=True,
            )
            grads.add(chunk, logits, parts, labels[chunk] == options.ignore_index)
    if not hidden.shape[0]:
        grads.without_tokens()
    dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
    return tuple(
        grad if dtype is None else grad.to(dtype)
        for grad, dtype in zip(grads.tensors, dtypes, strict=True)
    )


def _chunks(inputs: list[Tensor | None], options: LossOptions) -> Any:
    """Yields each chunk of tokens: its slice, its logits [C, V], and the inputs of its products.

    The inputs are the hidden states [C, E], the weight [V, E], and the adapter or None.
    """
    hidden, weight, _, low, up = inputs
    assert hidden is not None
    assert weight is not None
    tokens, dtype = hidden.shape[0], options.matmul_dtype
    weight = weight.to(dtype)
    up = None if up is None else up.to(dtype)
    size = min(options.chunk_tokens, tokens)
    buffer = logits_buffer(size, weight.shape[0], dtype, options.backend, hidden.device)
    for start in range(0, tokens, options.chunk_tokens):
        chunk = slice(start, min(start + options.chunk_tokens, tokens))
        logits = buffer[: chunk.stop - start]
        states = hidden[chunk].to(dtype)
        adapter = None if low is None or up is None else (low[chunk].to(dtype), up)
        project(states, weight, adapter, logits, options.batch_invariant)
        yield chunk, logits, (states, weight, adapter)


def check_label_range(labels: Tensor, options: LossOptions) -> None:
    """Raises ValueError for a label outside the vocabulary.

    Only labels on the CPU are checked; reading them on a GPU would synchronise.
    """
    if labels.device.type != "cpu":
        return
    outside = (labels != options.ignore_index) & ((labels < 0) | (labels >= options.num_words))
    if outside.any():
        position = int(outside.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {options.num_words}) or be {options.ignore_index}, "
            f"got {int(labels[position])} at position {position}. "
            "Check that the tokenizer belongs to the model."
        )


def accumulation_dtype(matmul_dtype: torch.dtype, hidden: Tensor) -> torch.dtype:
    """Returns the dtype of sums over the logits, for products of a dtype and hidden states."""
    wide = torch.promote_types(matmul_dtype, hidden.dtype)
    return torch.promote_types(wide, torch.float32)


def _fake_grads(
    inputs: list[Tensor | None], needs: list[bool], dtype: torch.dtype | None
) -> list[Tensor]:
    """Returns uninitialised gradients for fake tensors.

    Gradients that are sums over tokens (of weight and bias) have `dtype`, or the dtype of their
    input if `dtype` is None.
    """
    grads = []
    for place, (tensor, need) in enumerate(zip(inputs, needs, strict=True)):
        if tensor is None or not need:
            grads.append(torch.empty(0))
        else:
            own = place in (0, 3) or dtype is None
            grads.append(tensor.new_empty(tensor.shape, dtype=tensor.dtype if own else dtype))
    return grads


def _sum_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None,
              up: Tensor | None, labels: Tensor, token_weights: Tensor | None, needs: list[bool],
              *rest: Any) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = accumulation_dtype(LossOptions(*rest).matmul_dtype, hidden)
    grads = _fake_grads([hidden, weight, bias, low, up], needs, dtype)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype), *grads


def _tokens_fake(
    hidden: Tensor, weight: Tensor, bias: Any, low: Any, up: Any, labels: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    options = LossOptions(*rest)
    dtype = accumulation_dtype(options.matmul_dtype, hidden)
    tokens = hidden.shape[0]
    loss = hidden.new_empty(tokens, dtype=dtype)
    statistics = new_statistics(tokens, dtype, hidden.device, options.batch_invariant)
    return loss, torch.empty_like(loss), statistics


def _tokens_backward_fake(
    token_grad: Tensor, lse_grad: Any, statistics: Tensor, hidden: Tensor, weight: Tensor,
    bias: Any, low: Any, up: Any, labels: Tensor, needs: list[bool], *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(_fake_grads([hidden, weight, bias, low, up], needs, None))


_GRADS = ", ".join(["Tensor"] * NUM_GRADS)
cross_entropy_sum = define_operator(
    f"linear_cross_entropy_sum({_TENSORS}, Tensor? token_weights, {_NEEDS}, {SCHEMA}) "
    f"-> (Tensor, Tensor, {_GRADS})",
    _sum_forward,
    _sum_fake,
)
cross_entropy_tokens = define_operator(
    f"linear_cross_entropy_tokens({_TENSORS}, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _tokens_forward,
    _tokens_fake,
)
cross_entropy_tokens_backward = define_operator(
    "linear_cross_entropy_tokens_backward(Tensor token_grad, Tensor? lse_grad, Tensor statistics, "
    f"{_TENSORS}, {_NEEDS}, {SCHEMA}) -> ({_GRADS})",
    _tokens_backward,
    _tokens_backward_fake,
)
scale_gradient = define_operator(
    "scale_gradient(Tensor x, Tensor factor, ScalarType dtype, str backend) -> Tensor",
    scale_to,
    lambda x, factor, dtype, backend: x.new_empty(x.shape, dtype=dtype),
)


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = inputs[:NUM_GRADS]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    ctx.backend, ctx.num_inputs = inputs[-1], len(inputs)
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros of the weight's size for its gradient's gradient


def _sum_backward(ctx: Any, loss_grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if loss_grad is None:
        return (None,) * ctx.num_inputs
    needs = ctx.needs_input_grad[:NUM_GRADS]
    grads = [
        scale_gradient(grad, loss_grad, dtype, ctx.backend) if need else None
        for grad, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, needs, strict=True)
    ]
    return *grads, *(None for _ in range(ctx.num_inputs - NUM_GRADS))


def _tokens_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[NUM_GRADS + 1 :]
    ctx.save_for_backward(output[2], *inputs[: NUM_GRADS + 1])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _tokens_autograd(
    ctx: Any, token_grad: Tensor | None, lse_grad: Tensor | None, *unused: Any
) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:NUM_GRADS])
    statistics = ctx.saved_tensors[0]
    if token_grad is None:
        token_grad = torch.zeros_like(statistics[0])
    grads = cross_entropy_tokens_backward(
        token_grad, lse_grad, *ctx.saved_tensors, needs, *ctx.options
    )
    return (
        *(grad if need else None for grad, need in zip(grads, needs, strict=True)),
        *(None for _ in range(1 + len(ctx.options))),
    )


define_autograd(cross_entropy_sum, _sum_setup, _sum_backward)
define_autograd(cross_entropy_tokens, _tokens_setup, _tokens_autograd)
