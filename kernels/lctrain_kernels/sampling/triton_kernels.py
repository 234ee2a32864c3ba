"""The Triton kernels that choose a token per row of logits: the most probable one, or a draw."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(2**31 - 1)
_ONE = tl.constexpr(0x3F800000)
"""Bits of 1.0 in float32. Bits of floats from 0 to 1 have the order of the floats."""
_SMALL = tl.constexpr(1 / 16)
"""Numbers below which a series gives -log(1 - u), of which 1 - u would lose digits."""


@triton.jit
def most_probable_kernel(
    logits_ptr,
    tokens_ptr,
    log_probs_ptr,
    stride,
    num_words,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Finds the first largest logit of a row, and its log-probability.

    Shapes: logits [B, num_words], tokens [B] int64, log_probs [B] float32. Grid: (B,).

    The first loop finds the largest logit, the second one sums exponentials of differences to it.
    The row is in L2 then. The chosen token's difference is 0, so its log-probability is the
    negative logarithm of the sum. A NaN, an infinite logit or a row of -inf makes the sum NaN.

    Args:
        logits_ptr: Logits, column stride 1.
        tokens_ptr: Tokens; written.
        log_probs_ptr: Log-probabilities; written.
        stride: Stride of rows, in elements.
        num_words: Number of logits of a row. Multiples of 16 have wider loads.
        BLOCK: Logits that are read at a time.
        STAGES: Depth of the load pipeline.
    """
    row = tl.program_id(0)
    base = logits_ptr + row.to(tl.int64) * stride
    offsets = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    first = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, num_words, BLOCK, num_stages=STAGES):
        words = start + offsets
        z = tl.load(base + words, mask=words < num_words, other=float("-inf")).to(tl.float32)
        larger = z > m
        m = tl.where(larger, z, m)
        first = tl.where(larger, words, first)
    top = tl.max(m, axis=0)
    token = tl.min(tl.where(m == top, first, _LARGEST), axis=0)
    l = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, num_words, BLOCK, num_stages=STAGES):
        words = start + offsets
        inside = words < num_words
        z = tl.load(base + words, mask=inside, other=0.0).to(tl.float32)
        l += tl.where(inside, tl.exp2((z - top) * _LOG2_E), 0.0)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(log_probs_ptr + row, -tl.log(tl.sum(l, axis=0)))


@triton.jit
def _tempered(base, words, num_words, scale):
    """Returns logits times the scale, in float32; -inf behind the row."""
    z = tl.load(base + words, mask=words < num_words, other=float("-inf"))
    return z.to(tl.float32) * scale


@triton.jit
def _exponential(bits):
    """Returns exponential numbers -log(1 - u), for u = (bits + 1/2) / 2^31."""
    u = (bits.to(tl.float32) + 0.5) * (2.0**-31)
    series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    return tl.where(u < _SMALL, series, -tl.log(1.0 - u))


@triton.jit(do_not_specialize=["scale", "top_p"])
def draw_kernel(
    logits_ptr,
    keys_ptr,
    numbers_ptr,
    tokens_ptr,
    log_probs_ptr,
    stride,
    num_words,
    scale,
    top_p,
    HAS_TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Draws a token of a row from the softmax of its logits over the temperature.

    Shapes: logits [B, num_words], keys [B, 3] int32, numbers [num_words] int32, tokens [B] int64,
    log_probs [B] float32. Grid: (B,).

    The token has the largest sum of logit and Gumbel noise, whose bits are a hash of the word's
    number by the row's keys. With HAS_TOP_P, words of less probability than the fewest most
    probable ones that sum to top_p are left out: their lowest probability is found by bisection.
    The row is in L2 after the first loop.

    Args:
        logits_ptr: Logits, column stride 1.
        keys_ptr: Keys of each row's draw.
        numbers_ptr: A random number of 32 bits per word.
        tokens_ptr: Tokens; written.
        log_probs_ptr: Log-probabilities of the softmax without top_p; written.
        stride: Stride of rows, in elements.
        num_words: Number of logits of a row. Multiples of 16 have wider loads.
        scale: Factor of the logits, 1 over the temperature.
        top_p: Sum of the probabilities that are kept.
        HAS_TOP_P: Whether words are left out.
        BLOCK: Logits that are read at a time.
        STAGES: Depth of the load pipeline.
    """
    row = tl.program_id(0)
    base = logits_ptr + row.to(tl.int64) * stride
    offsets = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in tl.range(0, num_words, BLOCK, num_stages=STAGES):
        m = tl.maximum(m, _tempered(base, start + offsets, num_words, scale))
    top = tl.max(m, axis=0)
    l = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, num_words, BLOCK, num_stages=STAGES):
        words = start + offsets
        z = _tempered(base, words, num_words, scale)
        l += tl.where(words < num_words, tl.exp2((z - top) * _LOG2_E), 0.0)
    total = tl.sum(l, axis=0)
    low = row * 0
    if HAS_TOP_P:
        high = low + (_ONE + 1)
        for _ in tl.range(0, 30):  # bits of _ONE
            middle = (low + high) >> 1
            least = middle.to(tl.float32, bitcast=True)
            kept = tl.zeros([BLOCK], tl.float32)
            for start in tl.range(0, num_words, BLOCK, num_stages=STAGES):
                words = start + offsets
                z = _tempered(base, words, num_words, scale)
                p = tl.exp2((z - top) * _LOG2_E)
                kept += tl.where((p >= least) & (words < num_words), p, 0.0)
            enough = tl.sum(kept, axis=0) >= top_p * total
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
    least = low.to(tl.float32, bitcast=True)
    key = tl.load(keys_ptr + 3 * row)
    one = tl.load(keys_ptr + 3 * row + 1) | 1
    other = tl.load(keys_ptr + 3 * row + 2) | 1
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    first = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, num_words, BLOCK, num_stages=STAGES):
        words = start + offsets
        inside = words < num_words
        z = _tempered(base, words, num_words, scale)
        if HAS_TOP_P:
            z = tl.where(tl.exp2((z - top) * _LOG2_E) >= least, z, float("-inf"))
        bits = (tl.load(numbers_ptr + words, mask=inside, other=0) ^ key) * one
        # The shift copies the sign, so the highest bit is 0 afterwards; the others are as random.
        bits = ((bits ^ (bits >> 15)) * other) & _LARGEST
        score = z - tl.log(_exponential(bits))
        larger = score > best
        best = tl.where(larger, score, best)
        first = tl.where(larger, words, first)
    chosen = tl.max(best, axis=0)
    token = tl.min(tl.where(best == chosen, first, _LARGEST), axis=0)
    z = tl.load(base + token).to(tl.float32) * scale
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(log_probs_ptr + row, z - top - tl.log(total))
