"""Turns scores q.k into base-2 logits: scale, softcap and ALiBi.

A base-2 logit is the logit times log2(e), so that the softmax uses exp2 instead of exp.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def tanh(x):
    """Returns tanh(x) of float32 values, by one exp2; the error is a few units of 2^-24."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * _LOG2_E))
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def logits(
    s, query, key, shift, scale, softcap, slope, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr
):
    """Returns x [M, N] such that x * logits_multiplier(...) is the base-2 logit.

    The caller multiplies in the exponent, where the product is part of a fused multiply-add.

    Args:
        s: Tile of scores q.k, float32.
        query: Query positions in the document, broadcastable to s.
        key: Key positions in the document, broadcastable to s.
        shift: Number of keys minus number of queries of the document.
        scale: softmax_scale, the factor of q.k.
        softcap: Softcap c, which replaces a logit x by c tanh(x / c).
        slope: ALiBi slope, broadcastable to s.
        HAS_SOFTCAP: Whether the softcap is applied.
        HAS_ALIBI: Whether -slope * |query + shift - key| is added.
    """
    if HAS_SOFTCAP:
        s = tanh(s * (scale / softcap)) * (softcap * _LOG2_E)
    elif HAS_ALIBI:
        s = s * (scale * _LOG2_E)
    if HAS_ALIBI:
        s = s - (slope * _LOG2_E) * tl.abs(query + shift - key).to(tl.float32)
    return s


@triton.jit
def logits_multiplier(scale, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr):
    """Returns the factor that turns the result of logits() into base-2 logits.

    Without softcap and ALiBi, logits() returns s unchanged, and the factor is scale * log2(e).
    Otherwise logits() has applied this factor, and 1 is returned.
    """
    if HAS_SOFTCAP or HAS_ALIBI:
        return 1.0
    else:
        return scale * _LOG2_E


@triton.jit
def softcap_slope(s, scale, softcap):
    """Returns the softcap's derivative by its input scale * s: 1 - tanh^2(scale * s / softcap).

    Args:
        s: Scores q.k, float32.
        scale: softmax_scale, the factor of q.k.
        softcap: Softcap c, which replaces a logit x by c tanh(x / c).
    """
    bounded = tanh(s * (scale / softcap))
    return 1.0 - bounded * bounded
