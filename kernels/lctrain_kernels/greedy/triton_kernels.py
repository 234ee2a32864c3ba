"""The Triton kernel of the most probable token of a row of logits."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["num_words"])
def most_probable_kernel(
    logits_ptr,
    tokens_ptr,
    log_probs_ptr,
    stride,
    num_words,
    BLOCK: tl.constexpr,
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
        num_words: Number of logits of a row.
        BLOCK: Logits that are read at a time.
    """
    row = tl.program_id(0)
    base = logits_ptr + row.to(tl.int64) * stride
    offsets = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    first = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, num_words, BLOCK):
        words = start + offsets
        z = tl.load(base + words, mask=words < num_words, other=float("-inf")).to(tl.float32)
        larger = z > m
        m = tl.where(larger, z, m)
        first = tl.where(larger, words, first)
    top = tl.max(m, axis=0)
    token = tl.min(tl.where(m == top, first, _LARGEST), axis=0)
    l = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, num_words, BLOCK):
        words = start + offsets
        inside = words < num_words
        z = tl.load(base + words, mask=inside, other=0.0).to(tl.float32)
        l += tl.where(inside, tl.exp2((z - top) * _LOG2_E), 0.0)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(log_probs_ptr + row, -tl.log(tl.sum(l, axis=0)))
