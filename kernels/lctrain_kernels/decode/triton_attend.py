"""Device functions of the decode kernels: the keys of a cache, and the merge of splits."""

import triton
import triton.language as tl

from lctrain_kernels.tile.logits import logits
from lctrain_kernels.tile.mask import mask_logits
from lctrain_kernels.tile.memory import load_rows
from lctrain_kernels.tile.softmax import softmax_step


@triton.jit
def row_offsets(page, slot, local, page_stride, token_stride, SCATTERED: tl.constexpr):
    """Returns the offset of each key [BLOCK_N] int64 in a cache, from its page and slot.

    Args:
        page: Page of the keys: [BLOCK_N] if SCATTERED, else one number.
        slot: Place on the page: of each key [BLOCK_N] if SCATTERED, else of the first key.
        local: Index of each key in the tile, [BLOCK_N].
        page_stride: Stride of pages, in elements.
        token_stride: Stride of tokens, in elements.
        SCATTERED: Whether the keys may lie on several pages.
    """
    first = page.to(tl.int64) * page_stride + slot.to(tl.int64) * token_stride
    if SCATTERED:
        return first
    else:
        return first + local * token_stride


@triton.jit
def heads_of_tile(head_kv, heads_kv, TILE: tl.constexpr):
    """Returns the (key head, value head) in the cache of a key/value head of the grid.

    With TILE.halves, the cache has 2 G heads and the grid four times G: the pairs of a half of the
    key heads and a half of the value heads. Pair (a, b) has the grid's heads from (2 a + b) G on.

    Args:
        head_kv: Key/value head of the grid.
        heads_kv: Number of key/value heads of the grid.
        TILE: DecodeShape of the launch.
    """
    if TILE.halves:
        half = heads_kv // 4
        inside = head_kv % half
        pair = head_kv // half
        return pair // 2 * half + inside, pair % 2 * half + inside
    else:
        return head_kv, head_kv


@triton.jit
def load_page(table, n, leftpad, length, TILE: tl.constexpr):
    """Returns the page of the keys from position n on: of each [BLOCK_N] if TILE.scattered.

    Args:
        table: Pointer to the pages of a request.
        n: Position of the first key, a multiple of BLOCK_N.
        leftpad: Padding before the first key; 0 if not TILE.scattered.
        length: Number of keys that may be read; pages of later keys are not read.
        TILE: DecodeShape of the launch.
    """
    if TILE.scattered:
        key = n + tl.arange(0, TILE.block_n)
        return tl.load(table + (leftpad + key) // TILE.page, mask=key < length, other=0)
    else:
        return tl.load(table + n // TILE.page, mask=n < length, other=0)


@triton.jit
def attend(
    q,
    m,
    l,
    acc,
    begin,
    end,
    pointers,
    strides,
    request,
    head_kv,
    heads_kv,
    leftpad,
    length,
    place,
    left,
    right,
    scale,
    softcap,
    slope,
    multiplier,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Updates the online softmax (m, l, acc) of a tile by the keys [begin, end).

    The arithmetic of a block of keys is that of varlen_fwd_kernel, but every block has a mask. A
    compiler fuses the softcap's product into the exponent only where there is no mask, so a softcap
    rounds differently there. `begin` is a multiple of BLOCK_N. Blocks that a row does not see leave
    its m, l and acc as they are.

    Args:
        q: Queries [BLOCK_M, BLOCK_D].
        m: Running maximum [BLOCK_M].
        l: Running sum [BLOCK_M].
        acc: Accumulator of the output [BLOCK_M, BLOCK_D].
        begin: First key position.
        end: Key position after the last one, at most `length`.
        pointers: DecodePointers of the launch.
        strides: DecodeStrides of the launch.
        request: Index of the request, whose row or pages are read.
        head_kv: Key/value head.
        heads_kv: Number of key/value heads.
        leftpad: Padding before the first key.
        length: Number of keys that may be read.
        place: Position of each row's query among the keys, [BLOCK_M].
        left: Visible keys before a query's own position, if FLAGS.has_left.
        right: Visible keys after a query's own position, if FLAGS.has_right.
        scale: softmax_scale, the factor of q.k.
        softcap: Softcap c.
        slope: ALiBi slopes, [BLOCK_M, 1], or 0.
        multiplier: Factor from logits_multiplier.
        TILE: DecodeShape of the launch.
        FLAGS: DecodeFlags of the launch.
        PRECISION: Precision of matrix products.
    """
    local = tl.arange(0, TILE.block_n)
    columns = tl.arange(0, TILE.block_d)
    head_k, head_v = heads_of_tile(head_kv, heads_kv, TILE)
    k_base = pointers.k + head_k.to(tl.int64) * strides.k_head
    v_base = pointers.v + head_v.to(tl.int64) * strides.v_head
    row = request
    if pointers.batch_index is not None:
        row = tl.load(pointers.batch_index + request)
    first_seen = place - left
    last_seen = tl.minimum(place + right, length - 1)
    table = pointers.block_table
    if TILE.page > 0:
        table += request.to(tl.int64) * strides.block_table
        ahead = load_page(table, begin, leftpad, length, TILE)
    for n in tl.range(begin, end, TILE.block_n):
        key = n + local
        if TILE.page == 0:
            page = row
            slot = leftpad + n
        else:
            if TILE.prefetch:
                page = ahead
                ahead = load_page(table, n + TILE.block_n, leftpad, length, TILE)
            else:
                page = load_page(table, n, leftpad, length, TILE)
            slot = n % TILE.page
            if TILE.scattered:
                slot = (leftpad + key) % TILE.page
        k_rows = row_offsets(page, slot, local, strides.k_page, strides.k_token, TILE.scattered)
        k = load_rows(
            k_base + k_rows[:, None] + columns[None, :],
            key,
            length,
            columns,
            TILE.head_dim,
            TILE.block_d,
            True,
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        x = logits(
            s,
            place[:, None],
            key[None, :],
            0,
            scale,
            softcap,
            slope,
            FLAGS.has_softcap,
            pointers.alibi_slopes is not None,
        )
        x = mask_logits(x, local[None, :], first_seen - n, last_seen - n, FLAGS.has_left, True)
        p, alpha, m, l = softmax_step(x, multiplier, m, l)
        acc = acc * alpha[:, None]
        v_rows = row_offsets(page, slot, local, strides.v_page, strides.v_token, TILE.scattered)
        v = load_rows(
            v_base + v_rows[:, None] + columns[None, :],
            key,
            length,
            columns,
            TILE.head_dim,
            TILE.block_d,
            True,
        )
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return m, l, acc


@triton.jit
def merge_step(m, l, acc, m_split, l_split, acc_split):
    """Merges the online softmax of one split into that of the splits before it.

    Explicit fused multiply-adds fix the roundings, so that every kernel merges to the same bits. A
    split without a visible key changes nothing.

    Args:
        m: Maximum of the base-2 logits so far, [M].
        l: Sum of the weights so far, [M].
        acc: Accumulator so far, [M, D].
        m_split: Maximum of the split, [M].
        l_split: Sum of the split, [M].
        acc_split: Accumulator of the split, [M, D].
    """
    m_new = tl.maximum(m, m_split)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    old = tl.exp2(m - base)
    new = tl.exp2(m_split - base)
    l = tl.fma(l, old, l_split * new)
    acc = tl.fma(acc, tl.broadcast_to(old[:, None], acc.shape), acc_split * new[:, None])
    return m_new, l, acc
