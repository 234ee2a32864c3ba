"""The backward kernel of dual chunk attention that owns queries: dq."""

import triton
import triton.language as tl

from lctrain_kernels.tile.arguments import RUNTIME_INTEGERS
from lctrain_kernels.tile.chunks import NEAR, far_delta, far_end, keys_of_query, keys_of_tile
from lctrain_kernels.tile.dropout import keep_mask, load_key
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.tile.mask import mask_logits
from lctrain_kernels.tile.memory import load_rows
from lctrain_kernels.tile.rotary import (
    cos_sin,
    load_frequencies,
    load_pairs,
    pair_columns,
    rotate,
    store_pairs,
)
from lctrain_kernels.tile.seqlen import document_bounds, locate_program

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dual_chunk_dq_kernel(
    q_ptr,
    k_ptr,
    k_near_ptr,
    v_ptr,
    dout_ptr,
    stats_ptr,
    dq_ptr,
    cu_q_ptr,
    cu_k_ptr,
    tiles_ptr,
    inv_freq_ptr,
    logit_scale_ptr,
    seed_ptr,
    document_ids_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_nt,
    stride_nh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    stride_dqt,
    stride_dqh,
    num_tiles,
    total_q,
    chunk_length,
    near,
    far_position,
    scale,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_FAR: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of a tile, in two launches over the ways of tile/chunks.py.

    IS_FAR: queries at the far position, which dq holds when the kernel begins, against the far
    keys; their share of dq, rotated back to where the queries stand, takes their place. Otherwise:
    queries as they are, against keys rotated by -c (NEAR) and as they are (OWN); the far share is
    added. In one launch the rotation between the loops makes ptxas serialise the products (C7515).

    Grid: as varlen_fwd_kernel. q, dout, dq [T, H, D]; k, v [Tk, Hk, D]; k_near and stats as
    dual_chunk_rotate writes them.
    """
    POSITIONS: tl.constexpr = BLOCK_M // PACK
    head_kv, head_group, document, first = locate_program(
        tiles_ptr, num_tiles, POSITIONS, GROUP // PACK
    )
    if document < 0:
        return
    begin_q, length_q = document_bounds(cu_q_ptr, document)
    begin_k, length_k = document_bounds(cu_k_ptr, document)
    if first >= length_q:
        return
    shift = length_k - length_q
    last = tl.minimum(first + POSITIONS, length_q) - 1 + shift
    has_far = far_end(last, chunk_length, near) > 0
    if IS_FAR and not has_far:
        return

    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    pairs = pair_columns(HEAD_DIM, BLOCK_D)
    local_query = local_m % POSITIONS
    query = first + local_query
    inside = query < length_q
    position = query + shift
    tile_head = head_kv * GROUP + head_group * PACK + local_m // POSITIONS
    head = tl.where(inside, tile_head, 0).to(tl.int64)
    token = begin_q + query
    row_do = token * stride_dot + head * stride_doh
    do = load_rows(
        dout_ptr + row_do[:, None] + columns[None, :],
        query,
        length_q,
        columns,
        HEAD_DIM,
        BLOCK_D,
        True,
    )
    row_lse = head * total_q + token
    lse2 = tl.load(stats_ptr + row_lse * 4, mask=inside, other=float("inf"))
    delta = tl.load(stats_ptr + row_lse * 4 + 1, mask=inside, other=0.0)
    k_own = k_ptr + begin_k * stride_kt + head_kv.to(tl.int64) * stride_kh
    k_near = k_near_ptr + begin_k * stride_nt + head_kv.to(tl.int64) * stride_nh
    v_base = v_ptr + begin_k * stride_vt + head_kv.to(tl.int64) * stride_vh
    tile_v = local_n[:, None] * stride_vt + columns[None, :]
    if IS_FAR:
        q_rows = dq_ptr + (token * stride_dqt + head * stride_dqh)[:, None] + pairs[None, :]
    else:
        q_rows = q_ptr + (token * stride_qt + head * stride_qh)[:, None] + pairs[None, :]
    q = load_pairs(q_rows, query, length_q, HEAD_DIM, BLOCK_D, True)
    key_0 = 0
    key_1 = 0
    document_key = 0
    if HAS_DROPOUT:
        key_0, key_1, document_key = load_key(seed_ptr, document_ids_ptr, document)
    multiplier = scale * _LOG2_E
    dq_scale = scale * keep_scale
    if logit_scale_ptr is not None:
        factor = tl.load(logit_scale_ptr + document)
        multiplier *= factor
        dq_scale *= factor

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Unrolled, so that the strides of k are no state of the loops.
    for way in tl.static_range(0 if IS_FAR else 1, 1 if IS_FAR else 3):
        low, clear, high = keys_of_tile(
            first + shift, last, way, chunk_length, near, BLOCK_N, HAS_DROPOUT
        )
        first_seen, last_seen = keys_of_query(position, way, chunk_length, near)
        stride_k = tl.where(way == NEAR, stride_nt, stride_kt)
        k_base = tl.where(way == NEAR, k_near, k_own)
        tile_k = local_n[:, None] * stride_k + pairs[None, :]
        # Tiles without a mask, then those with one.
        for part in tl.static_range(0, 2):
            begin = low if part == 0 else clear
            end = clear if part == 0 else high
            # As in dual_chunk_fwd_kernel.
            if begin < end:
                k_tile = k_base + tl.cast(begin, tl.int64) * stride_k
                v_tile = v_base + tl.cast(begin, tl.int64) * stride_vt
                for n in tl.range(begin, end, BLOCK_N):
                    key = n + local_n
                    k = load_pairs(k_tile + tile_k, key, length_k, HEAD_DIM, BLOCK_D, part == 1)
                    v = load_rows(
                        v_tile + tile_v, key, length_k, columns, HEAD_DIM, BLOCK_D, part == 1
                    )
                    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                    if part == 1:
                        x = mask_logits(
                            x, local_n[None, :], first_seen - n, last_seen - n, True, True
                        )
                    p = tl.exp2(x * multiplier - lse2[:, None])
                    if HAS_DROPOUT:
                        keep = keep_mask(
                            key_0,
                            key_1,
                            document_key,
                            tile_head[:, None].to(tl.uint32),
                            first,
                            local_query[:, None],
                            n,
                            local_n[None, :],
                            threshold,
                        )
                        ds = tl.where(keep, p, 0.0) * dp - p * delta[:, None]
                    else:
                        ds = p * (dp - delta[:, None])
                    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
                    k_tile += BLOCK_N * stride_k
                    v_tile += BLOCK_N * stride_vt
    dq = dq * dq_scale
    dq_rows = dq_ptr + (token * stride_dqt + head * stride_dqh)[:, None] + pairs[None, :]
    if IS_FAR:
        turns, turns_rest = load_frequencies(inv_freq_ptr, HEAD_DIM, BLOCK_D)
        moved = far_delta(position, chunk_length, far_position)
        cos, sin = cos_sin(moved[:, None], turns[None, :], turns_rest[None, :])
        dq = rotate(dq, cos, -sin, BLOCK_M, BLOCK_D)
    elif has_far:
        met_far = tl.where(far_end(position, chunk_length, near) > 0, query, length_q)
        dq += load_pairs(dq_rows, met_far, length_q, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    store_pairs(dq_rows, dq, query, length_q, HEAD_DIM, BLOCK_D)
