"""Linear projection and cross-entropy in one operation that never holds all the logits.

The logits of T tokens over a vocabulary of V are computed for a chunk of tokens at a time and thrown away;
only the logsumexp of each token is kept. The backward computes each chunk of logits again, from the
upstream gradient of every token, so that every reduction has exact gradients (implementations that compute the
gradient in the forward know only one upstream number). It is one more matrix product per chunk, and in
exchange nothing of size [V, E] lives between forward and backward.

The three steps are registered with `torch.library`, so `torch.compile` treats them as one operation each and does
not unroll the loop over chunks, and activation checkpointing may run the forward twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

REDUCTIONS = ("sum", "mean", "none")
CHUNK_MULTIPLE = 128
# Bytes of one chunk of logits in the accumulation type. Each chunk of the backward reads and writes the whole
# gradient of the weight once, so an accelerator takes large chunks; a CPU takes chunks near its cache.
ACCELERATOR_CHUNK_BYTES = 512 * 2**20
CPU_CHUNK_BYTES = 64 * 2**20
# Rows of a half-precision weight that are converted to the accumulation type at a time, where the device has
# no matrix product with half-precision inputs and a float32 result.
VOCABULARY_BLOCK = 16384


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "sum",
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `labels` under `softmax(logits)`, without the [T, V] tensor of logits.

    With `z = logit_scale * (hidden @ weight.T + bias)` the logits are `z`, or `softcap * tanh(z / softcap)`
    where `softcap` is positive. Matrix products take their inputs in the dtype of `hidden`, or in autocast's
    dtype where that is on; everything else, with the sums over chunks in the gradients of `weight` and `bias`,
    is float32 (float64 for float64 inputs). Nothing here synchronises with an accelerator.

    Args:
        hidden: [T, E], floating point.
        weight: [V, E], the output embedding, with the dtype of `hidden` (any float dtype under autocast).
        labels: [T] int64, in [0, V) or `ignore_index`.
        bias: [V], floating point, or None. Entries of -inf remove a word from the vocabulary.
        softcap: bound of the logits as in Gemma 2; 0 turns it off.
        logit_scale: factor of the logits as in Cohere and, as `1 / logits_scaling`, Granite.
        ignore_index: label of tokens that count neither in the loss nor in the gradients.
        reduction: "sum", "mean" (over the valid tokens) or "none" (0 for ignored tokens).
        chunk_tokens: tokens whose logits exist at one time; None picks it from V.

    Returns:
        The loss, float32 (float64 for float64 inputs), 0-dim or [T] for "none", and the number of labels that are
        not `ignore_index`, int64 0-dim, on the device of `hidden`. Without a valid token the loss and all
        gradients are 0. A token without a finite logit has an infinite loss and no gradient.

    Raises:
        ValueError: for arguments that do not fit together. A label outside the vocabulary is a ValueError on
            the CPU and a device-side assertion on an accelerator.
    """
    _check(hidden, weight, labels, bias, softcap, reduction, chunk_tokens)
    if chunk_tokens is None:
        chunk_tokens = pick_chunk_tokens(weight.shape[0], hidden.device.type)
    token_loss, _ = _forward(
        hidden,
        weight,
        bias,
        labels,
        float(softcap),
        float(logit_scale),
        ignore_index,
        chunk_tokens,
        _matmul_dtype(hidden),
    )
    num_valid_tokens = (labels != ignore_index).sum()
    if reduction == "none":
        return token_loss, num_valid_tokens
    loss = token_loss.sum()
    if reduction == "mean":
        loss = loss / num_valid_tokens.clamp(min=1)
    return loss, num_valid_tokens


def pick_chunk_tokens(vocabulary: int, device_type: str = "cpu") -> int:
    """Tokens per chunk for which float32 logits stay within the byte budget of the device.

    Args:
        vocabulary: V.
        device_type: "cpu", or the type of an accelerator.

    Returns:
        A multiple of 128, at least 128.
    """
    budget = CPU_CHUNK_BYTES if device_type == "cpu" else ACCELERATOR_CHUNK_BYTES
    return max(budget // (4 * vocabulary) // CHUNK_MULTIPLE, 1) * CHUNK_MULTIPLE


@torch.library.custom_op("lctrain::linear_cross_entropy_forward", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    chunk_tokens: int,
    matmul_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Loss and logsumexp of each token, both [T] in the accumulation dtype."""
    _check_label_range(labels, weight.shape[0], ignore_index)
    token_loss = hidden.new_empty(hidden.shape[0], dtype=_accumulation_dtype(hidden))
    lse = torch.empty_like(token_loss)
    with torch.autocast(hidden.device.type, enabled=False):
        projection = weight.to(matmul_dtype)
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = _logits(hidden[chunk].to(matmul_dtype), projection, bias, softcap, logit_scale)
            valid = labels[chunk] != ignore_index
            target = labels[chunk].masked_fill(~valid, 0)
            lse[chunk] = logits.logsumexp(dim=-1)
            target_logit = logits.gather(1, target[:, None]).squeeze(1)
            token_loss[chunk] = (_finite(lse[chunk]) - target_logit).masked_fill_(~valid, 0.0)
    return token_loss, lse


@torch.library.custom_op("lctrain::linear_cross_entropy_backward", mutates_args=())
def _backward(
    token_grad: Tensor,
    lse: Tensor,
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
    accumulation = lse.dtype
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
                lse[chunk],
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
                # The state of an ignored token may hold anything: 0 * nan must not reach the weight.
                hidden_chunk = hidden_chunk.masked_fill(ignored[:, None], 0.0)
                _accumulate_outer(weight_grad, logits_grad, hidden_chunk)
    bias_dtype = accumulation if bias is None else bias.dtype
    return hidden_grad, weight_grad.to(weight.dtype), bias_grad.to(bias_dtype)


@_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    token_loss = hidden.new_empty(hidden.shape[0], dtype=_accumulation_dtype(hidden))
    return token_loss, torch.empty_like(token_loss)


@_backward.register_fake
def _(
    token_grad: Tensor, lse: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_hidden, needs_weight, needs_bias = rest[-3:]
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape if needs_weight else 0),
        weight.new_empty(
            weight.shape[0] if needs_bias else 0, dtype=lse.dtype if bias is None else bias.dtype
        ),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, labels, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, token_grad: Tensor | None, lse_grad: None) -> tuple[Any, ...]:
    assert lse_grad is None, "the logsumexp is not an output of linear_cross_entropy"
    no_options_grad = (None,) * (1 + len(ctx.options))  # and the labels'
    if token_grad is None:
        return None, None, None, *no_options_grad
    hidden, weight, bias, labels, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = _backward(token_grad, lse, hidden, weight, bias, labels, *ctx.options, *needs)
    return (
        *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)),
        *no_options_grad,
    )


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


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
    lse: Tensor,
    target: Tensor,
    ignored: Tensor,
    token_grad: Tensor,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    """Gradient of `hidden @ weight.T + bias`, [C, V]; overwrites `logits` where it can."""
    derivative = 1.0 - (logits / softcap).square_() if softcap > 0.0 else None
    grad = logits.sub_(_finite(lse)[:, None]).exp_()
    rows = torch.arange(grad.shape[0], device=grad.device)
    # A row without a finite logit has no softmax: its probabilities are 0 and so is its gradient.
    at_target = grad[rows, target] - torch.isfinite(lse).to(grad.dtype)
    grad.index_put_((rows, target), at_target)
    grad *= (token_grad * logit_scale)[:, None]
    if derivative is not None:
        grad *= derivative
    return grad.masked_fill_(ignored[:, None], 0.0)


def _finite(lse: Tensor) -> Tensor:
    """`lse` with -inf (no finite logit) replaced by 0, so that no -inf - -inf arises."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


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


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on (it leaves float64 alone, and so do we), else that of `hidden`."""
    device_type = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float,
    reduction: str,
    chunk_tokens: int | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden and weight must be [T, E] and [V, E], got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}. Flatten the batch dimensions of hidden."
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape ({hidden.shape[0]},), got {labels.dtype} of shape "
            f"{tuple(labels.shape)}. Pass one label for each row of hidden."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}. "
            "Pass one value for each row of weight."
        )
    if not hidden.is_floating_point() or (
        hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type)
    ):
        raise ValueError(
            "hidden and weight must have the same floating-point dtype outside autocast, got "
            f"{hidden.dtype} and {weight.dtype}. Convert one of them or use torch.autocast."
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}.")
    if softcap < 0.0:
        raise ValueError(f"softcap must be at least 0, got {softcap}. Use 0 to turn it off.")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(
            f"chunk_tokens must be at least 1, got {chunk_tokens}. Use None to have it picked."
        )


def _check_label_range(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raises for a label outside the vocabulary on the CPU; an accelerator would have to synchronise."""
    if labels.device.type != "cpu":
        return
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if outside.any():
        position = int(outside.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {vocabulary}) or be {ignore_index}, got {int(labels[position])} at "
            f"position {position}. Check that the tokenizer belongs to the model."
        )
