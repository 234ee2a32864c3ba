"""The backward kernel of dual chunk attention that owns queries: dq."""

import triton
import triton.language as tl

from lctrain.kernels.attention.launch import RUNTIME_INTEGERS
from lctrain.kernels.tile.chunks import FAR, NEAR, far_delta, keys_of_query, keys_of_tile
from lctrain.kernels.tile.dropout import keep_mask, load_key
from lctrain.kernels.tile.logits import LOG2_E
from lctrain.kernels.tile.mask import mask_logits
from lctrain.kernels.tile.memory import load_rows, store_rows
from lctrain.kernels.tile.rotary import cos_sin, load_frequencies, pair_columns, rotate
from lctrain.kernels.tile.seqlen import document_bounds, locate_program

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dual_chunk_dq_kernel(
    q_ptr,
    q_far_ptr,
    k_ptr,
    k_near_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    dq_ptr,
    stats_ptr,
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
    stride_ot,
    stride_oh,
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
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of a tile; also writes what the dk, dv kernel reads per query.

    The three ways of tile/chunks.py, each with its own q and k: FAR takes queries at the far
    position, and their dq is rotated back before the others are added; NEAR takes the queries as
    they are and keys rotated by -c; OWN takes both as they are.

    Grid: as varlen_fwd_kernel. q, out, dout [T, H, D]; dq and q_far [T, H, D] of one layout; k, v
    [Tk, Hk, D]; k_near [Tk, Hk, D] contiguous; lse, dlse [H, T] float32. stats [H, T, 4] float32:
    lse in base 2 (+inf where nothing was seen), delta / keep_scale with delta = rowsum(dout * out)
    - dlse, two unused.
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
    row_o = token * stride_ot + head * stride_oh
    o = load_rows(
        out_ptr + row_o[:, None] + columns[None, :],
        query,
        length_q,
        columns,
        HEAD_DIM,
        BLOCK_D,
        True,
    )
    row_lse = head * total_q + token
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row_lse, mask=inside, other=0.0)
    # Dropout: ds / keep_scale = (Z / keep_scale) p dp - p delta / keep_scale; the factor goes into
    # dq and dk.
    delta = delta / keep_scale
    lse = tl.load(lse_ptr + row_lse, mask=inside, other=float("inf"))
    # A row that saw nothing has no weights: 2^(x - inf) = 0.
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)
    tl.store(stats_ptr + row_lse * 4, lse2, mask=inside)
    tl.store(stats_ptr + row_lse * 4 + 1, delta, mask=inside)

    row_q = token * stride_qt + head * stride_qh
    row_dq = token * stride_dqt + head * stride_dqh
    k_own = k_ptr + begin_k * stride_kt + head_kv.to(tl.int64) * stride_kh
    k_near = k_near_ptr + begin_k * stride_nt + head_kv.to(tl.int64) * stride_nh
    v_base = v_ptr + begin_k * stride_vt + head_kv.to(tl.int64) * stride_vh
    tile_v = local_n[:, None] * stride_vt + columns[None, :]
    turns, turns_rest = load_frequencies(inv_freq_ptr, HEAD_DIM, BLOCK_D)
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
    for way in tl.range(0, 3):
        low, _, high = keys_of_tile(
            first + shift, last, way, chunk_length, near, BLOCK_N, HAS_DROPOUT
        )
        if low < high:
            q_from = tl.where(way == FAR, q_far_ptr, q_ptr)
            row = tl.where(way == FAR, row_dq, row_q)
            q = load_rows(
                q_from + row[:, None] + pairs[None, :],
                query,
                length_q,
                pairs,
                HEAD_DIM,
                BLOCK_D,
                True,
            )
            first_seen, last_seen = keys_of_query(position, way, chunk_length, near)
            stride_k = tl.where(way == NEAR, stride_nt, stride_kt)
            k_base = tl.where(way == NEAR, k_near, k_own)
            tile_k = local_n[:, None] * stride_k + pairs[None, :]
            k_tile = k_base + tl.cast(low, tl.int64) * stride_k
            v_tile = v_base + tl.cast(low, tl.int64) * stride_vt
            # One loop that masks every tile: with a second one beside it, ptxas takes the rotation
            # below for a reason to serialise the products (C7515).
            for n in tl.range(low, high, BLOCK_N):
                key = n + local_n
                k = load_rows(k_tile + tile_k, key, length_k, pairs, HEAD_DIM, BLOCK_D, True)
                v = load_rows(v_tile + tile_v, key, length_k, columns, HEAD_DIM, BLOCK_D, True)
                x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                x = mask_logits(x, local_n[None, :], first_seen - n, last_seen - n, True, True)
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
            if way == FAR:
                moved = far_delta(position, chunk_length, far_position)
                cos, sin = cos_sin(moved[:, None], turns[None, :], turns_rest[None, :])
                dq = rotate(dq, cos, -sin, BLOCK_M, BLOCK_D)
    store_rows(
        dq_ptr + row_dq[:, None] + pairs[None, :],
        dq * dq_scale,
        query,
        length_q,
        pairs,
        HEAD_DIM,
        BLOCK_D,
    )
