"""The kernel that rotates new keys and writes new keys and values into the cache."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lctrain_kernels.decode.triton_tile import RUNTIME_INTEGERS, rotated_rows


class AppendPointers(NamedTuple):
    """Pointers to the tensors of decode_append_kernel: those of KVCache and NewTokens."""

    k: Any
    v: Any
    k_cache: Any
    v_cache: Any
    seqlens: Any
    batch_index: Any
    block_table: Any
    cos: Any
    sin: Any


class AppendStrides(NamedTuple):
    """Strides in elements. A page of a dense cache is the row of a request."""

    k_batch: Any
    k_token: Any
    k_head: Any
    v_batch: Any
    v_token: Any
    v_head: Any
    k_cache_page: Any
    k_cache_token: Any
    k_cache_head: Any
    v_cache_page: Any
    v_cache_token: Any
    v_cache_head: Any
    block_table: Any


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def decode_append_kernel(
    pointers: AppendPointers,
    strides: AppendStrides,
    new_tokens,
    capacity,
    num_pages,
    heads_kv,
    rotary_rows,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Writes TOKENS new keys, rotated, and values of one request and head into the cache.

    Shapes: k and v [B, new_tokens, Hk, D]. The grid has one axis: requests x blocks of TOKENS x
    key/value heads. A token without a place in the cache (beyond the capacity, or on a page that
    does not exist) is not written. The other arguments are those of triton_attention.py.

    Args:
        pointers: Tensors.
        strides: Strides of the tensors.
        new_tokens: Number of new tokens of each request.
        capacity: Most tokens of a request.
        num_pages: Number of pages of the cache; of rows, if it is dense.
        heads_kv: Number of key/value heads.
        rotary_rows: Number of rows of the tables of cosines and sines.
        TILE: Sizes, a DecodeShape.
        FLAGS: Features of the call, a DecodeFlags.
        TOKENS: Tokens of a program.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(new_tokens, TOKENS)
    head = (pid % heads_kv).to(tl.int64)
    block = pid // heads_kv % blocks
    request = pid // heads_kv // blocks
    token = block * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, TILE.block_d)
    index = tl.load(pointers.seqlens + request) + token
    known = (token < new_tokens) & (index >= 0) & (index < capacity)
    if TILE.page == 0:
        page = request
        if pointers.batch_index is not None:
            page = tl.load(pointers.batch_index + request)
        page = page + token * 0
        slot = index
    else:
        table = pointers.block_table + request.to(tl.int64) * strides.block_table
        page = tl.load(table + index // TILE.page, mask=known, other=-1)
        slot = index % TILE.page
    known = known & (page >= 0) & (page < num_pages)
    inside = known[:, None] & (columns < TILE.head_dim)[None, :]

    row = request.to(tl.int64)
    new = token.to(tl.int64)
    k_ptrs = pointers.k + row * strides.k_batch + new * strides.k_token + head * strides.k_head
    if TILE.rotary == 0:
        k = tl.load(k_ptrs[:, None] + columns[None, :], mask=inside, other=0.0)
    else:
        k = rotated_rows(
            k_ptrs,
            columns,
            inside,
            pointers.cos,
            pointers.sin,
            index,
            rotary_rows,
            TILE.rotary,
            FLAGS.interleaved,
        )
    v_ptrs = pointers.v + row * strides.v_batch + new * strides.v_token + head * strides.v_head
    v = tl.load(v_ptrs[:, None] + columns[None, :], mask=inside, other=0.0)

    page = page.to(tl.int64)
    slot = slot.to(tl.int64)
    k_place = (
        page * strides.k_cache_page + slot * strides.k_cache_token + head * strides.k_cache_head
    )
    k_out = pointers.k_cache + k_place[:, None] + columns[None, :]
    tl.store(k_out, k.to(pointers.k_cache.dtype.element_ty), mask=inside)
    v_place = (
        page * strides.v_cache_page + slot * strides.v_cache_token + head * strides.v_cache_head
    )
    v_out = pointers.v_cache + v_place[:, None] + columns[None, :]
    tl.store(v_out, v.to(pointers.v_cache.dtype.element_ty), mask=inside)
