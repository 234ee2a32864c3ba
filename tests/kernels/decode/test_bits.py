"""Tests which calls give the same bits: split="fixed" and split="exact"."""

import pytest
import torch

from lctrain.kernels import (
    DecodePlan,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    make_decode_plan,
)
from tests.kernels.decode.kvcache import KVCase, make_kv
from tests.kernels.oracle import cumulative

HEADS, HEADS_K, HEAD_DIM = 4, 2, 16


def one_request(cache, request, q, k, v, length, **options):
    """Calls the function for one request of a dense cache, in a copy of its row."""
    row = [side[request : request + 1].clone() for side in cache]
    return flash_attn_with_kvcache(
        q[None], *row, k[None], v[None], cache_seqlens=length, backend="triton", **options
    )[0]


@pytest.fixture(scope="module")
def tokens(device):
    """Queries, keys and values [3, 160, heads, D] of three requests."""
    generator = torch.Generator().manual_seed(3)
    heads = (HEADS, HEADS_K, HEADS_K)
    return [
        torch.randn(3, 160, count, HEAD_DIM, generator=generator).to(device, torch.float16)
        for count in heads
    ]


def test_prefill_chunks_and_single_tokens_have_the_same_bits(tokens):
    """A prefill of many queries runs decode_whole_kernel, a single query decode_split_kernel."""
    q, k, v = (x[:1, :100] for x in tokens)
    cache = [torch.full_like(x, float("nan")) for x in (k, v)]
    options = {"causal": True, "window_size": (70, 0), "backend": "triton"}
    whole = flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=0, **options)
    cache = [torch.full_like(x, float("nan")) for x in (k, v)]
    begin, parts = 0, []
    for size in (80, 13, 1, 6):
        piece = slice(begin, begin + size)
        parts.append(
            flash_attn_with_kvcache(
                q[:, piece], *cache, k[:, piece], v[:, piece], cache_seqlens=begin, **options
            )
        )
        begin += size
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("split", ["fixed", "exact"])
def test_batches_pages_and_padding_change_no_bit(tokens, split, device):
    lengths = (70, 159, 3)
    q, k, v = (torch.stack([x[i, n - 1 : n] for i, n in enumerate(lengths)]) for x in tokens)
    options = {"causal": True, "split": split}
    alone = [
        one_request(tokens[1:], i, q[i], k[i], v[i], n - 1, **options)
        for i, n in enumerate(lengths)
    ]
    options |= {"backend": "triton"}
    stored = torch.tensor([n - 1 for n in lengths], dtype=torch.int32, device=device)
    batch = flash_attn_with_kvcache(
        q, *(x.clone() for x in tokens[1:]), k, v, cache_seqlens=stored, **options
    )
    assert torch.equal(batch, torch.stack(alone))
    for page, order in ((16, torch.randperm(30)), (32, torch.arange(15).flip(0))):
        table = order.view(3, -1).to(device)
        pools = []
        for x in tokens[1:]:
            pool = torch.empty(table.numel(), page, HEADS_K, HEAD_DIM, dtype=x.dtype, device=device)
            pool[table.flatten()] = x.view(-1, page, HEADS_K, HEAD_DIM)
            pools.append(pool)
        paged = flash_attn_with_kvcache(
            q, *pools, k, v, cache_seqlens=stored, block_table=table.int(), **options
        )
        assert torch.equal(paged, batch)
    shifted = [torch.cat((x[:, :7] * float("nan"), x), 1) for x in tokens[1:]]
    pads = torch.full_like(stored, 7)
    padded = flash_attn_with_kvcache(
        q, *shifted, k, v, cache_seqlens=stored + 7, cache_leftpad=pads, **options
    )
    assert torch.equal(padded, batch)


def test_exact_has_the_bits_of_the_training_forward(tokens, device, products_of_any_tile):
    """A request's queries, one at a time and all at once, beside a pack of the same documents."""
    softcap = 3.0 if device.type == "cpu" else 0.0  # on a GPU only equal up to rounding
    lengths, options = (100, 41), {"window_size": (60, 0), "softcap": softcap}
    cu = cumulative(lengths, device)
    pack = [torch.cat([x[i, :n] for i, n in enumerate(lengths)]) for x in tokens]
    trained, lse = flash_attn_varlen_func(
        *pack, cu, cu, 100, 100, causal=True, backend="triton", return_lse=True, **options
    )
    options = {"split": "exact", "causal": True, "return_softmax_lse": True, **options}
    options["backend"] = "triton"
    begin = 0
    for request, length in enumerate(lengths):
        q, k, v = (x[request : request + 1, :length] for x in tokens)
        found = flash_attn_with_kvcache(q, k.clone(), v.clone(), cache_seqlens=length, **options)
        assert torch.equal(found[0][0], trained[begin : begin + length])
        assert torch.equal(found[1][0], lse[:, begin : begin + length])
        for place in (0, length - 1):
            found = flash_attn_with_kvcache(
                q[:, place : place + 1], k.clone(), v.clone(), cache_seqlens=place + 1, **options
            )
            assert torch.equal(found[0][0, 0], trained[begin + place])
        begin += length


def test_a_plan_changes_no_bit_and_lists_the_splits(device):
    case = KVCase(lengths=(77, 0, 140, 63), new=1, causal=True, window=(70, 0))
    inputs = make_kv(case, device)
    stored = inputs.options["cache_seqlens"]
    plan = make_decode_plan(
        stored, case.capacity, case.head_dim, torch.float16, window_size=case.window
    )
    if device.type == "cuda":
        expected = inputs.call()
    else:
        from lctrain_kernels.decode.launch_plan import fill_plan

        assert plan[:-2] == DecodePlan(plan.work, 1, case.capacity, 1, 1, 70)[:-2]
        assert torch.equal(plan.seqlens, stored)
        plan = fill_plan(stored, None, case.capacity, 64, seqlen_q=1, new_tokens=1, window_left=70)
        assert plan.max_splits == 3
        # Splits 0 and 1 of request 0, split 0 of requests 1 and 3, 1 and 2 of request 2.
        assert plan.work[0] == 6
        assert plan.work[1:7].tolist() == [0, 1, 3, 7, 8, 9]
        expected = inputs.call(backend="triton")
    for changes in ({"plan": plan}, {"max_seqlen_k": 141}):
        found = inputs.call(backend="triton", **changes)
        assert all(map(torch.equal, found, expected))
