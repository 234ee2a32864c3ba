"""One block of the online softmax, and the random bits that drop its weights."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lctrain.kernels.hopper.step import draw_words, kept, rounded, tanh
from lctrain.kernels.tile.logits import LOG2_E

_LOG2_E = gl.constexpr(LOG2_E)


@gluon.jit
def block_words(
    random, block, BLOCK_N: gl.constexpr, s_layout: gl.constexpr, HAS_DROPOUT: gl.constexpr
):
    """Random bits for a block of weights. They need no scores, so they are drawn meanwhile."""
    return key_words(random, block * BLOCK_N, BLOCK_N, s_layout, HAS_DROPOUT)


@gluon.jit
def key_words(
    random, key, BLOCK_N: gl.constexpr, s_layout: gl.constexpr, HAS_DROPOUT: gl.constexpr
):
    """As block_words, of a block that starts at `key`, a multiple of 32."""
    words = 0
    if HAS_DROPOUT:
        key_0, key_1, document_key, head, first, local_query = random
        local_key = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
        words = draw_words(
            key_0,
            key_1,
            document_key,
            head[:, None].to(gl.uint32),
            first,
            local_query[:, None],
            key,
            local_key[None, :],
        )
    return words


@gluon.jit
def block_weights(
    s,
    m,
    l,
    block,
    rows,
    visible,
    words,
    threshold,
    scale,
    softcap,
    s_layout: gl.constexpr,
    dtype: gl.constexpr,
    FLAGS: gl.constexpr,
    FEW_REGISTERS: gl.constexpr = False,
):
    """One block of the online softmax: (p in dtype, alpha, m, l); s [64, BLOCK_N] = q.k."""
    BLOCK_N: gl.constexpr = s.shape[1]
    HAS_LEFT: gl.constexpr = FLAGS[0]
    HAS_SOFTCAP: gl.constexpr = FLAGS[2]
    HAS_DROPOUT: gl.constexpr = FLAGS[4]
    IN_DOCUMENT: gl.constexpr = HAS_DROPOUT or FEW_REGISTERS
    first, local_query = rows
    shift, length_k, left, right, clear_low, clear_high = visible
    query = first + local_query
    local_key = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
    key = block * BLOCK_N
    multiplier = scale * _LOG2_E
    if HAS_SOFTCAP:
        s = tanh(s * (scale / softcap)) * (softcap * _LOG2_E)
        multiplier = 1.0
    if (key + BLOCK_N > clear_high) | (key < clear_low):
        # Positions inside the block cost fewer instructions, those in the document fewer registers,
        # which random bits need.
        start = 0 if IN_DOCUMENT else key
        keys = local_key + key if IN_DOCUMENT else local_key
        last = gl.minimum(query + shift + right, length_k - 1) - start
        s = gl.where(keys[None, :] <= last[:, None], s, float("-inf"))
        if HAS_LEFT:
            s = gl.where(keys[None, :] >= (query + shift - left - start)[:, None], s, float("-inf"))
    return masked_weights(s, m, l, words, threshold, multiplier, s_layout, dtype, HAS_DROPOUT)


@gluon.jit
def masked_weights(
    s,
    m,
    l,
    words,
    threshold,
    multiplier,
    s_layout: gl.constexpr,
    dtype: gl.constexpr,
    HAS_DROPOUT: gl.constexpr,
):
    """As block_weights, of s that is -inf where nothing is seen; the exponent is s * multiplier."""
    m_new = gl.maximum(m, gl.max(s, 1) * multiplier)
    base = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * multiplier - base[:, None])
    alpha = gl.exp2(m - base)
    l = l * alpha + gl.sum(p, 1)
    if HAS_DROPOUT:
        local_key = gl.arange(0, s.shape[1], gl.SliceLayout(0, s_layout))
        p = rounded(gl.where(kept(words, local_key[None, :], threshold), p, 0.0), dtype)
    return p.to(dtype), alpha, m_new, l
