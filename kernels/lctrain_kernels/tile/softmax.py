"""The online softmax, in base 2, with a true -inf for what is not visible."""

import triton
import triton.language as tl

from lctrain_kernels.tile.logits import LN_2

_LN_2 = tl.constexpr(LN_2)


@triton.jit
def softmax_step(x, multiplier, m, l):
    """One tile of the online softmax along the last axis.

    Args:
        x: [M, N] float32 logits; -inf where not visible.
        multiplier: Positive factor of the exponent.
        m: [M] running maximum of x * multiplier.
        l: [M] running sum of 2^(x * multiplier - m).

    Returns:
        p [M, N] = 2^(x * multiplier - m), alpha [M] for the accumulator, m and l.
    """
    m_new = tl.maximum(m, tl.max(x, 1) * multiplier)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(x * multiplier - base[:, None])
    alpha = tl.exp2(m - base)
    return p, alpha, m_new, l * alpha + tl.sum(p, 1)


@triton.jit
def add_sink(acc, m, l, sink):
    """Adds a learnable logit without a value (base 2, may be -inf) to the softmax."""
    m_new = tl.maximum(m, sink)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - base)
    return acc * alpha[:, None], m_new, l * alpha + tl.exp2(sink - base)


@triton.jit
def finish(acc, m, l, value_scale):
    """Returns out [M, D] and the natural lse [M]; 0 and -inf for rows that see no key."""
    empty = l == 0.0
    inverse = value_scale / tl.where(empty, 1.0, l)
    lse = tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, l))) * _LN_2)
    return acc * inverse[:, None], lse
