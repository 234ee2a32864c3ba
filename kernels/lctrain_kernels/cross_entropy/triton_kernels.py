"""Triton kernels of linear_cross_entropy: softmax statistics and gradient of a chunk of logits.

A program processes one row at a time. It keeps a running maximum and sum per group of GROUP
adjacent logits, so rescaling the sum costs one exponential per group. The gradient overwrites the
logits.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lctrain_kernels.tile.divide import divide

_LOG2_E = tl.constexpr(1.4426950408889634)
GROUP = tl.constexpr(8)  # words per lane: 16 bytes in half precision


class RowPointers(NamedTuple):
    """Pointers to the tensors of row_pass_kernel; the kernel's docstring gives their shapes."""

    logits: Any
    bias: Any
    labels: Any
    statistics: Any
    token_grad: Any
    lse_grad: Any


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _tanh(x, DTYPE: tl.constexpr):
    return 1.0 - divide(2.0, tl.exp2(x * (2.0 * _LOG2_E)) + 1.0, DTYPE)


@triton.jit
def _logits(raw, bias_ptr, words, num_words, softcap, scale, HAS_SOFTCAP: tl.constexpr):
    """Returns float32 logits from matrix products, with bias, scale and softcap applied.

    Args:
        raw: Results of the matrix product.
        bias_ptr: Bias [V], or None.
        words: Index in the vocabulary of each logit, in raw's shape.
        num_words: Size of the vocabulary on this rank; logits outside are -inf.
        softcap: Softcap c, which replaces a logit x by c tanh(x / c).
        scale: Factor of the logits.
        HAS_SOFTCAP: Whether the softcap is applied.
    """
    inside = (words >= 0) & (words < num_words)
    z = raw.to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + words, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    if HAS_SOFTCAP:
        z = softcap * _tanh(divide(z, softcap, raw.dtype), raw.dtype)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _statistics(
    base,
    width,
    num_words,
    bias_ptr,
    softcap,
    scale,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    """Returns the maximum, the sum of exp(z - maximum) and the sum of the logits z of one row.

    The logits z are those that `_logits` computes. If no logit is finite, the maximum and the sum
    of exponentials are 0. Without HAS_SMOOTHING the third result is 0.

    Args:
        base: Pointer to the row.
        width: Number of elements of the row that may be read, its stride.
        num_words: Number of logits in the row.
        bias_ptr: Bias [V], or None.
        softcap: Softcap of the logits.
        scale: Factor of the logits.
        BLOCK: Number of logits that are loaded at a time.
        STAGES: Depth of the load pipeline.
        HAS_SOFTCAP: Whether the softcap is applied.
        HAS_SMOOTHING: Whether the sum of the logits is needed.
    """
    LANES: tl.constexpr = BLOCK // GROUP
    offsets = tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    m = tl.full([LANES], float("-inf"), tl.float32)
    l = tl.zeros([LANES], tl.float32)
    z_sum = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, num_words, BLOCK, num_stages=STAGES):
        words = start + offsets
        raw = tl.load(base + words, mask=words < width, other=0.0, eviction_policy="evict_last")
        z = _logits(raw, bias_ptr, words, num_words, softcap, scale, HAS_SOFTCAP)
        if HAS_SMOOTHING:
            z_sum += tl.sum(tl.where(words < num_words, z, 0.0), axis=1)
        new = tl.maximum(m, tl.max(z, axis=1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        l = l * _exp(m - shift) + tl.sum(_exp(z - shift[:, None]), axis=1)
        m = new
    top = tl.max(m, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(l * _exp(m - top), axis=0), tl.sum(z_sum, axis=0)


@triton.jit
def _write_gradient(
    base,
    width,
    num_words,
    bias_ptr,
    softcap,
    scale,
    top,
    target,
    on_p,
    on_target,
    on_all,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    """Overwrites one row of matrix products x with the gradient of x.

    A logit is z = softcap * tanh(y / softcap) with y = scale * (x + bias), or z = y without a
    softcap. The gradient of x is

        (on_p * exp(z - top) - on_all - (on_target at the label, else 0)) * dz / dy

    dy / dx = scale is not applied: on_p, on_all and on_target contain it already.

    Args:
        base: Pointer to the row.
        width: Number of elements of the row that may be written, its stride.
        num_words: Number of logits in the row. The elements after them become 0.
        bias_ptr: Bias [V], or None.
        softcap: Softcap of the logits.
        scale: Factor of the logits.
        top: Maximum of the row's logits z.
        target: Index of the label in the row. An index outside the row marks no element.
        on_p: Factor of exp(z - top), times scale.
        on_target: Number to subtract at the label, times scale.
        on_all: Number to subtract from all elements for label smoothing, times scale.
        BLOCK: Number of logits that are loaded at a time.
        STAGES: Depth of the load pipeline.
        HAS_SOFTCAP: Whether the softcap is applied.
        HAS_SMOOTHING: Whether on_all is subtracted; if not, on_all is not read.
    """
    LANES: tl.constexpr = BLOCK // GROUP
    offsets = tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    for start in tl.range(0, num_words, BLOCK, num_stages=STAGES):
        words = start + offsets
        raw = tl.load(base + words, mask=words < width, other=0.0, eviction_policy="evict_first")
        z = _logits(raw, bias_ptr, words, num_words, softcap, scale, HAS_SOFTCAP)
        d = on_p * _exp(z - top) - tl.where(words == target, on_target, 0.0)
        if HAS_SMOOTHING:
            d -= on_all
        if HAS_SOFTCAP:
            share = divide(z, softcap, raw.dtype)
            d *= 1.0 - share * share
        tl.store(base + words, d.to(base.dtype.element_ty), mask=words < width)


@triton.jit
def _write_zeros(base, width, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], base.dtype.element_ty)
    for start in range(0, width, BLOCK):
        tl.store(base + start + offsets, zero, mask=start + offsets < width)


@triton.jit(do_not_specialize=["num_rows", "num_words", "ignore_index", "first_word"])
def row_pass_kernel(
    pointers: RowPointers,
    stride_logits,
    stride_statistics,
    num_rows,
    num_words,
    first_word,
    ignore_index,
    softcap,
    scale,
    smoothing,
    uniform,
    z_loss,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    READS_STATISTICS: tl.constexpr,
    WRITES_GRADIENT: tl.constexpr,
):
    """Computes the statistics of the C rows of a chunk of logits, or their gradients, or both.

    Grid: any number of programs; each loops over rows. With few programs a row stays in the L2
    cache until its second reading.

    With lse = log(sum of exp(z)), a row's loss is

        (1 - smoothing) * (lse - z[label]) + smoothing * (lse - mean of z) + z_loss * lse^2

    A row with the label ignore_index gets zeros.

    Args:
        pointers: Pointers to the tensors:

            - logits [C, V]: results of the matrix product, which the gradient overwrites. All
              columns up to the row stride may be written.
            - bias [V]; labels [C] int64.
            - statistics [4, C] float32: maximum of the logits z, sum of exp(z - maximum), logit z
              of the label, sum of z.
            - token_grad [C] float32: gradient of each token's loss; None is 1.
            - lse_grad [C] float32: gradient of each token's lse, which is added; None is 0.
        stride_logits: Elements from one row of logits to the next.
        stride_statistics: Elements from one row of statistics to the next.
        num_rows: Number of rows C.
        num_words: Number of logits V in a row: this rank's part of the vocabulary.
        first_word: Index in the vocabulary of the row's first logit.
        ignore_index: Label of rows without a loss.
        softcap: Softcap of the logits.
        scale: Factor of the logits.
        smoothing: Label smoothing.
        uniform: smoothing / size of the whole vocabulary.
        z_loss: Factor of lse^2.
        BLOCK: Number of logits that are loaded at a time.
        STAGES: Depth of the load pipeline.
        HAS_SOFTCAP: Whether the softcap is applied.
        HAS_SMOOTHING: Whether there is label smoothing.
        READS_STATISTICS: Whether the statistics are read, instead of computed and written.
        WRITES_GRADIENT: Whether the gradient overwrites the logits.
    """
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        base = pointers.logits + row * stride_logits
        label = tl.load(pointers.labels + row)
        place = pointers.statistics + row
        if label == ignore_index:
            if not READS_STATISTICS:
                for number in tl.static_range(4):
                    tl.store(place + number * stride_statistics, 0.0)
            if WRITES_GRADIENT:
                _write_zeros(base, stride_logits, BLOCK)
        else:
            target = (label - first_word).to(tl.int32)
            if READS_STATISTICS:
                top = tl.load(place)
                total = tl.load(place + stride_statistics)
            else:
                top, total, z_sum = _statistics(
                    base, stride_logits, num_words, pointers.bias, softcap, scale,
                    BLOCK, STAGES, HAS_SOFTCAP, HAS_SMOOTHING,
                )  # fmt: skip
                owned = (target >= 0) & (target < num_words)
                product = tl.load(base + target, mask=owned, other=0.0)
                z_target = _logits(
                    product, pointers.bias, target, num_words, softcap, scale, HAS_SOFTCAP
                )
                tl.store(place, top)
                tl.store(place + stride_statistics, total)
                tl.store(place + 2 * stride_statistics, tl.where(owned, z_target, 0.0))
                tl.store(place + 3 * stride_statistics, z_sum)
            if WRITES_GRADIENT:
                tl.debug_barrier()  # every thread has read the label's logit
                grad = 1.0
                if pointers.token_grad is not None:
                    grad = tl.load(pointers.token_grad + row)
                empty = total == 0.0  # no finite logit: no softmax
                grad = tl.where(empty, 0.0, grad)
                total = tl.where(empty, 1.0, total)
                on_p = grad * (1.0 + 2.0 * z_loss * (top + tl.log(total)))
                if pointers.lse_grad is not None:
                    on_p += tl.where(empty, 0.0, tl.load(pointers.lse_grad + row))
                on_p = divide(on_p * scale, total, base.dtype.element_ty)
                grad = grad * scale
                _write_gradient(
                    base, stride_logits, num_words, pointers.bias, softcap, scale, top, target,
                    on_p, grad * (1.0 - smoothing), grad * uniform,
                    BLOCK, STAGES, HAS_SOFTCAP, HAS_SMOOTHING,
                )  # fmt: skip


@triton.jit
def scale_kernel(x_ptr, factor_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    """Computes out = x * factor in float32, and rounds it to out's dtype.

    x and out have numel elements and are contiguous; factor is one float32 number in device memory.
    A program computes BLOCK elements. Grid: (cdiv(numel, BLOCK),).
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x *= tl.load(factor_ptr)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=mask)
