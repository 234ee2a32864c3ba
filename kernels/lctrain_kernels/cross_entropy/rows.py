"""The pass over a chunk's logits: softmax statistics, gradient of the logits, loss of its tokens.

The statistics of a row of logits z are four numbers: the maximum m, the sum of exp(z - m), the
logit of the label, and the sum of the logits (0 without label smoothing). m and the sum of
exponentials are stored separately, because rounding m + log(sum) beside a large m would dominate
the error of a small loss. `row_pass` runs in Triton or in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain_kernels.cross_entropy.options import LossOptions
from lctrain_kernels.fused_backend import FusedCall, triton_refuses
from lctrain_kernels.multiprocessors import multiprocessors
from lctrain_kernels.registry import BACKWARD, FORWARD, implementation, implements

MAXIMUM, EXP_SUM, TARGET, LOGIT_SUM = range(4)
NUM_STATISTICS = 4
STATISTICS_MULTIPLE = 16
SCALE_BLOCK = 4096
HALF = (torch.bfloat16, torch.float16)


def _wide_products(call: FusedCall) -> str | None:
    return None if call.dtype in HALF else f"products of {call.dtype}, but of half precision"


_refuses = triton_refuses(_wide_products)


def new_statistics(
    rows: int, dtype: torch.dtype, device: torch.device, batch_invariant: bool
) -> Tensor:
    """Allocates the statistics of rows of logits, [4, rows].

    With batch_invariant, the stride is a multiple of 16 for any number of rows, so that the Triton
    kernel has one binary for all numbers.
    """
    width = rows
    if batch_invariant:
        width = -(-rows // STATISTICS_MULTIPLE) * STATISTICS_MULTIPLE
    return torch.empty(NUM_STATISTICS, width, dtype=dtype, device=device)[:, :rows]


def row_pass(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    statistics: Tensor,
    token_grad: Tensor | None,
    lse_grad: Tensor | None,
    options: LossOptions,
    *,
    reads_statistics: bool,
    writes_gradient: bool,
) -> None:
    """Computes the statistics of the rows, overwrites the logits with their gradient, or both.

    Args:
        logits: Results of the matrix product, [C, V]; overwritten by the gradient.
        bias: Bias of the logits, [V], or None.
        labels: Token ids, [C] int64.
        statistics: Statistics of each row, [4, C], in the accumulation dtype; written unless
            `reads_statistics`.
        token_grad: Gradient of each token's loss, [C]; None for 1.
        lse_grad: Gradient of each token's logsumexp, [C], or None.
        options: Softcap, label smoothing and the other options of the loss.
        reads_statistics: Whether to use the given statistics instead of computing them.
        writes_gradient: Whether to overwrite the logits with their gradient.
    """
    direction = BACKWARD if writes_gradient else FORWARD
    implementation("linear_cross_entropy", direction, options.backend)(
        logits, bias, labels, statistics, token_grad, lse_grad, options,
        reads_statistics, writes_gradient,
    )  # fmt: skip


@implements("linear_cross_entropy", FORWARD, "pytorch")
@implements("linear_cross_entropy", BACKWARD, "pytorch")
def _pytorch_row_pass(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    statistics: Tensor,
    token_grad: Tensor | None,
    lse_grad: Tensor | None,
    options: LossOptions,
    reads_statistics: bool,
    writes_gradient: bool,
) -> None:
    z = finish_logits(logits, bias, options)
    ignored = labels == options.ignore_index
    target = (labels - options.first_word).masked_fill(ignored, -1)
    owned = (target >= 0) & (target < logits.shape[1])
    target = target.masked_fill(~owned, 0)[:, None]
    if not reads_statistics:
        if options.batch_invariant:
            _find_row_by_row(logits, bias, target, owned, ignored, statistics, options)
        else:
            _find_statistics(z, target, owned, ignored, statistics, options)
    if writes_gradient:
        _write_gradient(
            logits, z, target, owned, ignored, statistics, token_grad, lse_grad, options
        )


def token_losses(statistics: Tensor, labels: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Returns the loss [T] and the logsumexp [T] of each token; both are 0 for ignored tokens.

    Args:
        statistics: Statistics of each row of logits, [4, T].
        labels: Token ids, [T] int64.
        options: Label smoothing, z-loss and ignore_index.
    """
    if options.batch_invariant and options.backend == "pytorch" and len(labels) > 1:
        parts = [
            token_losses(statistics[:, i : i + 1].clone(), labels[i : i + 1].clone(), options)
            for i in range(len(labels))
        ]
        return torch.cat([loss for loss, _ in parts]), torch.cat([lse for _, lse in parts])
    m, exp_sum, target, logit_sum = statistics
    log_sum = exp_sum.log()
    lse = m + log_sum
    loss = log_sum - (target - m)
    if options.label_smoothing > 0.0:
        # m is subtracted from the mean of the logits, as from the label's logit.
        spread = log_sum - (logit_sum / options.num_words - m)
        loss = (1.0 - options.label_smoothing) * loss + options.label_smoothing * spread
    if options.z_loss > 0.0:
        loss = loss + options.z_loss * lse.square()
    ignored = labels == options.ignore_index
    empty = exp_sum == 0.0  # no finite logit
    loss = loss.masked_fill(empty, torch.inf).masked_fill(ignored, 0.0)
    return loss, lse.masked_fill(ignored, 0.0)


def finish_logits(logits: Tensor, bias: Tensor | None, options: LossOptions) -> Tensor:
    """Applies bias, logit scale and softcap to the results of the matrix product.

    Returns:
        The logits, a new tensor [C, V] in the accumulation dtype.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if bias is not None:
        z += bias
    if options.logit_scale != 1.0:
        z *= options.logit_scale
    if options.softcap > 0.0:
        z.div_(options.softcap).tanh_().mul_(options.softcap)
    return z


def scale_to(x: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Returns x * factor, computed in float32 and rounded once to `dtype`; factor is 0-dim."""
    return implementation("scale_gradient", FORWARD, backend)(x, factor, dtype)


@implements("scale_gradient", FORWARD, "triton", _refuses)
def _triton_scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    from lctrain_kernels.cross_entropy.triton_kernels import scale_kernel
    from lctrain_kernels.launch import cdiv, launch

    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        launch(scale_kernel, (cdiv(x.numel(), SCALE_BLOCK),))(
            x, factor, out, x.numel(), BLOCK=SCALE_BLOCK, num_warps=8, enable_fp_fusion=True
        )
    return out


@implements("scale_gradient", FORWARD, "pytorch")
def _pytorch_scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.to(torch.promote_types(x.dtype, factor.dtype)) * factor).to(dtype)


def _find_statistics(
    z: Tensor,
    target: Tensor,
    owned: Tensor,
    ignored: Tensor,
    statistics: Tensor,
    options: LossOptions,
) -> None:
    m = z.amax(dim=-1)
    m = m.masked_fill(m == -torch.inf, 0.0)  # no finite logit: no -inf - -inf
    statistics[MAXIMUM] = m
    statistics[EXP_SUM] = (z - m[:, None]).exp_().sum(dim=-1)
    statistics[TARGET] = z.gather(1, target)[:, 0].masked_fill(~owned, 0.0)
    statistics[LOGIT_SUM] = z.sum(dim=-1) if options.label_smoothing > 0.0 else 0.0
    statistics.masked_fill_(ignored, 0.0)


def _find_row_by_row(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    owned: Tensor,
    ignored: Tensor,
    statistics: Tensor,
    options: LossOptions,
) -> None:
    """Writes the statistics of every row of logits [C, V], each computed from this row alone."""
    for row in range(len(logits)):
        part = slice(row, row + 1)
        found = new_statistics(1, statistics.dtype, statistics.device, True)
        z = finish_logits(logits[part].contiguous(), bias, options)
        _find_statistics(z, target[part], owned[part], ignored[part], found, options)
        statistics[:, part] = found


def _write_gradient(
    logits: Tensor,
    z: Tensor,
    target: Tensor,
    owned: Tensor,
    ignored: Tensor,
    statistics: Tensor,
    token_grad: Tensor | None,
    lse_grad: Tensor | None,
    options: LossOptions,
) -> None:
    m, exp_sum = statistics[MAXIMUM], statistics[EXP_SUM]
    none = exp_sum == 0.0
    exp_sum = exp_sum.masked_fill(none, 1.0)
    grad = torch.ones_like(m) if token_grad is None else token_grad
    grad = grad.masked_fill(none, 0.0)
    on_p = grad
    if options.z_loss > 0.0:
        on_p = grad * (1.0 + 2.0 * options.z_loss * (m + exp_sum.log()))
    if lse_grad is not None:
        on_p = on_p + lse_grad.masked_fill(none, 0.0)
    derivative = 1.0 - (z / options.softcap).square_() if options.softcap > 0.0 else None
    d = z.sub_(m[:, None]).exp_().mul_((on_p / exp_sum)[:, None])
    on_target = grad * (1.0 - options.label_smoothing)
    d.scatter_add_(1, target, -on_target.masked_fill(~owned, 0.0)[:, None])
    if options.label_smoothing > 0.0:
        d -= (grad * options.label_smoothing / options.num_words)[:, None]
    if options.logit_scale != 1.0:
        d *= options.logit_scale
    if derivative is not None:
        d *= derivative
    logits.copy_(d.masked_fill_(ignored[:, None], 0.0))


@implements("linear_cross_entropy", FORWARD, "triton", _refuses)
@implements("linear_cross_entropy", BACKWARD, "triton", _refuses)
def _triton_row_pass(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    statistics: Tensor,
    token_grad: Tensor | None,
    lse_grad: Tensor | None,
    options: LossOptions,
    reads_statistics: bool,
    writes_gradient: bool,
) -> None:
    from lctrain_kernels.cross_entropy.config import row_config
    from lctrain_kernels.cross_entropy.triton_kernels import RowPointers, row_pass_kernel
    from lctrain_kernels.launch import launch

    if not logits.shape[0]:
        return
    config = row_config(logits.dtype)
    rows = logits.shape[0]
    launch(row_pass_kernel, (min(rows, config.programs * multiprocessors(logits.device)),))(
        RowPointers(logits, bias, labels, statistics, token_grad, lse_grad),
        logits.stride(0),
        statistics.stride(0),
        rows,
        logits.shape[1],
        options.first_word,
        options.ignore_index,
        options.softcap,
        options.logit_scale,
        options.label_smoothing,
        options.label_smoothing / options.num_words,
        options.z_loss,
        BLOCK=config.block,
        STAGES=config.stages,
        HAS_SOFTCAP=options.softcap > 0.0,
        HAS_SMOOTHING=options.label_smoothing > 0.0,
        READS_STATISTICS=reads_statistics,
        WRITES_GRADIENT=writes_gradient,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
