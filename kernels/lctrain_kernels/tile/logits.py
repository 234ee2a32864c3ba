"""Converts products q.k to logits in base 2, and differentiates that step."""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def tanh(x):
    """tanh by one exponential; accurate to a few float32 roundings of 1."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * _LOG2_E))
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def logits(
    s, query, key, shift, scale, softcap, slope, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr
):
    """Returns x such that 2^(x * multiplier) is the unnormalised weight; see logits_multiplier.

    Args:
        s: q.k, float32 tile.
        query: Query positions, broadcastable to s.
        key: Key positions, broadcastable to s.
        shift: Lk - Lq.
        scale: softmax_scale.
        softcap: c.
        slope: ALiBi slope, broadcastable to s.
        HAS_SOFTCAP: c tanh(x / c).
        HAS_ALIBI: Adds -slope * |query + shift - key|.
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
    """Returns the factor that logits() leaves to the exponent's multiply-add."""
    if HAS_SOFTCAP or HAS_ALIBI:
        return 1.0
    else:
        return scale * _LOG2_E


@triton.jit
def softcap_slope(s, scale, softcap):
    """d(logit) / d(scale * s) under the softcap."""
    bounded = tanh(s * (scale / softcap))
    return 1.0 - bounded * bounded
