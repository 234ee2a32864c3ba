"""Forward and backward of `linear_cross_entropy` over chunks of tokens, in plain PyTorch.

Both are registered with `torch.library`: `torch.compile` sees one operation and does not unroll the
loop over chunks, and activation checkpointing of either kind may run the forward twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Rows of a half-precision weight that are converted to float32 at a time, where the device has no
# matrix product with half-precision inputs and a float32 result.
VOCABULARY_BLOCK = 16384


@torch.library.custom_op("lctrain::linear_cross_entropy_forward", mutates_args=())
def linear_cross_entropy_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    chunk_tokens: int,
    matmul_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, maximum m of the logits, and sum of exp(logits - m) of each token.

    All are [T] in the accumulation dtype. m and the sum are kept apart, not as one logsumexp:
    beside a large m, the rounding of m + log(sum) would be most of the error of a small loss.
    """
    _check_label_range(labels, weight.shape[0], ignore_index)
    token_loss = hidden.new_empty(hidden.shape[0], dtype=_accumulation_dtype(hidden))
    m, exp_sum = torch.empty_like(token_loss), torch.empty_like(token_loss)
    with torch.autocast(hidden.device.type, enabled=False):
        projection = weight.to(matmul_dtype)
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = _logits(hidden[chunk].to(matmul_dtype), projection, bias, softcap, logit_scale)
            m[chunk] = _finite(logits.amax(dim=-1))
            shifted = logits.sub_(m[chunk, None])
            ignored = labels[chunk] == ignore_index
            target = shifted.gather(1, labels[chunk, None].masked_fill(ignored[:, None], 0))[:, 0]
            exp_sum[chunk] = shifted.exp_().sum(dim=-1)
            loss = exp_sum[chunk].log() - target
            loss.masked_fill_(exp_sum[chunk] == 0.0, torch.inf)  # no finite logit
            token_loss[chunk] = loss.masked_fill_(ignored, 0.0)
    return token_loss, m, exp_sum


@torch.library.custom_op("lctrain::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    token_grad: Tensor,
    m: Tensor,
    exp_sum: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    chunk_tokens: int,
    matmul_dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; one that is not needed comes back with no elements."""
    accumulation = m.dtype
    hidden_grad = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    # [V, E] and [V]
    weight_grad = weight.new_zeros(weight.shape if needs_weight else 0, dtype=accumulation)
    bias_grad = weight.new_zeros(weight.shape[0] if needs_bias else 0, dtype=accumulation)
    with torch.autocast(hidden.device.type, enabled=False):
        projection = weight.to(matmul_dtype)
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            ignored = labels[chunk] == ignore_index
            hidden_chunk = hidden[chunk].to(matmul_dtype)
            logits = _logits(hidden_chunk, projection, bias, softcap, logit_scale)
            logits_grad = _logits_grad(
                logits,
                m[chunk],
                exp_sum[chunk],
                labels[chunk].masked_fill(ignored, 0),
                ignored,
                token_grad[chunk],
                softcap,
                logit_scale,
            )
            if needs_bias:
                bias_grad += logits_grad.sum(dim=0)
            if needs_hidden:
                hidden_grad[chunk] = _project_back(logits_grad, projection)
            if needs_weight:
                # The state of an ignored token may be nan, and 0 * nan must not reach the weight.
                hidden_chunk = hidden_chunk.masked_fill(ignored[:, None], 0.0)
                _accumulate_outer(weight_grad, logits_grad, hidden_chunk)
    bias_dtype = accumulation if bias is None else bias.dtype
    return hidden_grad, weight_grad.to(weight.dtype), bias_grad.to(bias_dtype)


@linear_cross_entropy_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    token_loss = hidden.new_empty(hidden.shape[0], dtype=_accumulation_dtype(hidden))
    return token_loss, torch.empty_like(token_loss), torch.empty_like(token_loss)


@linear_cross_entropy_backward.register_fake
def _(
    token_grad: Tensor,
    m: Tensor,
    exp_sum: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    needs_hidden, needs_weight, needs_bias = rest[-3:]
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape if needs_weight else 0),
        weight.new_empty(
            weight.shape[0] if needs_bias else 0, dtype=m.dtype if bias is None else bias.dtype
        ),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    hidden, weight, bias, labels, *ctx.options = inputs
    ctx.save_for_backward(*output[1:], hidden, weight, bias, labels)
    ctx.mark_non_differentiable(*output[1:])


def _autograd_backward(ctx: Any, token_grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:3])
    grads = linear_cross_entropy_backward(token_grad, *ctx.saved_tensors, *ctx.options, *needs)
    return (
        *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)),
        *(None for _ in ("labels", *ctx.options)),
    )


linear_cross_entropy_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def _logits(
    hidden: Tensor, projection: Tensor, bias: Tensor | None, softcap: float, logit_scale: float
) -> Tensor:
    """Logits of a chunk, [C, V] in the accumulation dtype."""
    logits = _project(hidden, projection)
    if bias is not None:
        logits += bias
    if logit_scale != 1.0:
        logits *= logit_scale
    if softcap > 0.0:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _logits_grad(
    logits: Tensor,
    m: Tensor,
    exp_sum: Tensor,
    target: Tensor,
    ignored: Tensor,
    token_grad: Tensor,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    """Gradient of `hidden @ weight.T + bias`, [C, V]; overwrites `logits`."""
    derivative = 1.0 - (logits / softcap).square_() if softcap > 0.0 else None
    # A row without a finite logit has no softmax, and no gradient.
    has_softmax = exp_sum != 0.0
    token_grad = token_grad.masked_fill(~has_softmax, 0.0)
    grad = logits.sub_(m[:, None]).exp_()
    grad *= (token_grad / exp_sum.masked_fill(~has_softmax, 1.0))[:, None]
    rows = torch.arange(grad.shape[0], device=grad.device)
    grad.index_put_((rows, target), grad[rows, target] - token_grad)
    if logit_scale != 1.0:
        grad *= logit_scale
    if derivative is not None:
        grad *= derivative
    return grad.masked_fill_(ignored[:, None], 0.0)


def _finite(m: Tensor) -> Tensor:
    """`m` with -inf (no finite logit) replaced by 0, so that no -inf - -inf arises."""
    return m.masked_fill(m == -torch.inf, 0.0)


def _project(hidden: Tensor, projection: Tensor) -> Tensor:
    """hidden [C, E] @ projection [V, E].T in the accumulation dtype."""
    accumulation = _accumulation_dtype(hidden)
    if hidden.dtype == accumulation:
        return hidden @ projection.t()
    if _has_mixed_matmul(hidden):
        return torch.mm(hidden, projection.t(), out_dtype=accumulation)
    wide = hidden.to(accumulation)
    blocks = projection.split(VOCABULARY_BLOCK)
    return torch.cat([wide @ block.to(accumulation).t() for block in blocks], dim=1)


def _project_back(logits_grad: Tensor, projection: Tensor) -> Tensor:
    """logits_grad [C, V] @ projection [V, E] in the accumulation dtype."""
    if projection.dtype == logits_grad.dtype:
        return logits_grad @ projection
    if _has_mixed_matmul(projection):
        return torch.mm(logits_grad.to(projection.dtype), projection, out_dtype=logits_grad.dtype)
    out = logits_grad.new_zeros(logits_grad.shape[0], projection.shape[1])
    for start in range(0, projection.shape[0], VOCABULARY_BLOCK):
        block = slice(start, start + VOCABULARY_BLOCK)
        out.addmm_(logits_grad[:, block], projection[block].to(logits_grad.dtype))
    return out


def _accumulate_outer(weight_grad: Tensor, logits_grad: Tensor, hidden: Tensor) -> None:
    """weight_grad [V, E] += logits_grad [C, V].T @ hidden [C, E], in place."""
    if hidden.dtype == weight_grad.dtype or not _has_mixed_matmul(hidden):
        weight_grad.addmm_(logits_grad.t(), hidden.to(weight_grad.dtype))
        return
    narrow = logits_grad.to(hidden.dtype)
    for start in range(0, weight_grad.shape[0], VOCABULARY_BLOCK):
        block = slice(start, start + VOCABULARY_BLOCK)
        weight_grad[block] += torch.mm(narrow[:, block].t(), hidden, out_dtype=weight_grad.dtype)


def _has_mixed_matmul(tensor: Tensor) -> bool:
    """Whether this device multiplies half-precision matrices into a float32 result."""
    return tensor.is_cuda and torch.version.hip is None


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_label_range(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raises for a label outside the vocabulary, on the CPU: elsewhere it would synchronise."""
    if labels.device.type != "cpu":
        return
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if outside.any():
        position = int(outside.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {vocabulary}) or be {ignore_index}, "
            f"got {int(labels[position])} at position {position}. "
            "Check that the tokenizer belongs to the model."
        )
