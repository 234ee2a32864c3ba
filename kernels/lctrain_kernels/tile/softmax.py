"""The online softmax of the portable kernels, in base 2. Masked logits are -inf."""

import triton
import triton.language as tl

from lctrain_kernels.tile.logits import LN_2

_LN_2 = tl.constexpr(LN_2)


@triton.jit
def softmax_step(x, multiplier, m, l):
    """Updates the online softmax by one block of logits.

    Args:
        x: Logits [M, N] float32; -inf where masked.
        multiplier: Positive factor of x in the exponent.
        m: Running maximum of x * multiplier, [M].
        l: Running sum of 2^(x * multiplier - m), [M].

    Returns:
        The weights p [M, N] = 2^(x * multiplier - m), the factor alpha [M] by which the caller
        rescales its accumulator, and the new m and l.
    """
    m_new = tl.maximum(m, tl.max(x, 1) * multiplier)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(x * multiplier - base[:, None])
    alpha = tl.exp2(m - base)
    return p, alpha, m_new, l * alpha + tl.sum(p, 1)


@triton.jit
def add_sink(acc, m, l, sink):
    """Adds a learnable sink to the online softmax: a logit without a value.

    Args:
        acc: Accumulator of the output, [M, D] float32.
        m: Running maximum, [M], base 2.
        l: Running sum, [M].
        sink: The sink's base-2 logit of each row, [M]; may be -inf.

    Returns:
        The rescaled accumulator acc [M, D], the running maximum m [M] and the running sum l [M].
    """
    m_new = tl.maximum(m, sink)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - base)
    return acc * alpha[:, None], m_new, l * alpha + tl.exp2(sink - base)


@triton.jit
def finish(acc, m, l, value_scale):
    """Returns out = value_scale * acc / l [M, D] and lse [M], both float32.

    A row that sees no key has out = 0 and lse = -inf.

    Args:
        acc: Accumulator of the output, [M, D] float32.
        m: Maximum of each row's base-2 logits, [M].
        l: Sum of each row's weights, [M].
        value_scale: Factor of the output, 1 / keep probability of dropout.
    """
    empty = l == 0.0
    inverse = value_scale / tl.where(empty, 1.0, l)
    lse = tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, l))) * _LN_2)
    return acc * inverse[:, None], lse
