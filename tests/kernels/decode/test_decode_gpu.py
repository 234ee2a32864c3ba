"""Compares decode attention on a GPU with float64, and tests CUDA graphs and large caches."""

import dataclasses

import pytest
import torch

from lctrain.kernels import flash_attn_varlen_func, flash_attn_with_kvcache, make_decode_plan
from tests.kernels.decode.kvcache import KVCase, assert_matches_plain, make_kv, plain_kvcache
from tests.kernels.decode.test_kvcache import CASES
from tests.kernels.decode.test_packed import PackedCase, make_call, plain
from tests.kernels.decode.test_prefixes import plan_of, share, shared_of
from tests.kernels.oracle import cumulative
from tests.numerics import assert_error_at_most_twice

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_filled_memory")]

LONG = KVCase(lengths=(3000, 0, 517, 4000), capacity=4096, new=1, causal=True, heads=8)
GPU_CASES = {
    "D64": dataclasses.replace(LONG, head_dim=64),
    "D128-g4": dataclasses.replace(LONG, head_dim=128, heads_k=2),
    "D128-g4-page16": dataclasses.replace(LONG, head_dim=128, heads_k=2, page=16),
    "D128-g8-page256": dataclasses.replace(LONG, head_dim=128, heads_k=1, page=256),
    "D128-page64-speculative": dataclasses.replace(LONG, head_dim=128, page=64, seqlen_q=4, new=4),
    "D128-prefill": dataclasses.replace(LONG, head_dim=128, seqlen_q=96, new=96, page=32),
    "D256-page16": dataclasses.replace(LONG, head_dim=256, page=16, seqlen_q=2, new=2),
    "D256-prefill": dataclasses.replace(LONG, head_dim=256, seqlen_q=90, new=90),
    "D80-group3-window": dataclasses.replace(
        LONG, head_dim=80, heads=6, heads_k=2, window=(700, 0), page=64
    ),
    "D128-everything": dataclasses.replace(
        CASES["everything"], head_dim=128, lengths=(3000, 517, 9), capacity=4096, window=(900, -1)
    ),
    "D128-exact": dataclasses.replace(LONG, head_dim=128, split="exact", page=128),
    "D128-num_splits5": dataclasses.replace(LONG, head_dim=128, num_splits=5),
}


@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES.keys())
def test_matches_float64(case, device):
    assert_matches_plain(case, make_kv(case, device, torch.bfloat16), backend="triton")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page", [0, 16, 256])
def test_a_query_has_the_bits_of_its_prefill(head_dim, page, device, make_tokens):
    """Prefill, chunks, and single queries in a batch of other requests."""
    q, k, v = make_tokens(1, 2300, head_dim)
    whole = flash_attn_with_kvcache(
        q, torch.empty_like(k), torch.empty_like(v), k, v, cache_seqlens=0, causal=True
    )
    cache = (torch.empty_like(k), torch.empty_like(v))
    first = flash_attn_with_kvcache(
        q[:, :1700], *cache, k[:, :1700], v[:, :1700], cache_seqlens=0, causal=True
    )
    rest = flash_attn_with_kvcache(
        q[:, 1700:], *cache, k[:, 1700:], v[:, 1700:], cache_seqlens=1700, causal=True
    )
    assert torch.equal(torch.cat((first, rest), 1), whole)
    places = torch.tensor([0, 1, 511, 512, 700, 1700, 2299], device=device)
    options = {"cache_seqlens": (places + 1).int(), "causal": True}
    if page:
        pages = -(-2300 // page)
        padded = [torch.cat((x, x[:, : pages * page - 2300]), 1) for x in (k, v)]
        cache = [x.view(pages, page, *x.shape[2:]) for x in padded]
        order = torch.randperm(pages, device=device)
        cache = [torch.empty_like(x).index_copy_(0, order, x) for x in cache]
        options["block_table"] = order.int().expand(len(places), -1).contiguous()
    else:
        cache = [x.expand(len(places), -1, -1, -1) for x in (k, v)]
    single = flash_attn_with_kvcache(q[0, places][:, None], *cache, **options)
    assert torch.equal(single[:, 0], whole[0, places])


@pytest.fixture
def make_tokens(device):
    """Returns a factory of bfloat16 queries, keys and values [B, S, heads, D]."""

    def make(requests: int, length: int, head_dim: int, heads=(8, 2, 2)) -> list[torch.Tensor]:
        shapes = ((requests, length, count, head_dim) for count in heads)
        return [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]

    return make


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_exact_has_the_bits_of_the_training_forward(head_dim, device, make_tokens):
    q, k, v = make_tokens(1, 1500, head_dim)
    cu = torch.tensor([0, 1500], dtype=torch.int32, device=device)
    trained = flash_attn_varlen_func(
        q[0], k[0], v[0], cu, cu, 1500, 1500, causal=True, backend="triton"
    )
    options = {"causal": True, "split": "exact"}
    whole = flash_attn_with_kvcache(q, k, v, cache_seqlens=1500, **options)
    assert torch.equal(whole[0], trained)
    for place in (0, 63, 64, 777, 1499):
        one = flash_attn_with_kvcache(
            q[:, place : place + 1], k, v, cache_seqlens=place + 1, **options
        )
        assert torch.equal(one[0, 0], trained[place])


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("planned", [False, True], ids=["alone", "plan"])
def test_a_cuda_graph_replays_with_other_lengths(page, planned, device, no_synchronisation):
    case = dataclasses.replace(LONG, head_dim=128, page=page)
    inputs = make_kv(case, device, torch.bfloat16)
    lengths = inputs.options["cache_seqlens"]
    inputs.k_cache.nan_to_num_(0.5)
    inputs.v_cache.nan_to_num_(0.5)

    def call():
        plan = None
        if planned:
            plan = make_decode_plan(lengths, case.capacity, 128, torch.bfloat16)
        return inputs.call(plan=plan)

    with no_synchronisation():
        call()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = call()
    for values in ((5, 4000, 1024, 0), (4095, 1, 511, 2047)):
        lengths.copy_(torch.tensor(values, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        found = [x.clone() for x in captured]
        assert all(map(torch.equal, found, inputs.call()))


@pytest.mark.xdist_group("gpu_memory")
def test_caches_beyond_two_to_the_31_elements(device):
    """The last row of a dense cache, and the last page of a paged one, lie beyond 2^31."""
    tokens = 2**31 // (8 * 128) + 4096
    q = torch.randn(1, 1, 32, 128, device=device, dtype=torch.bfloat16)
    small = [torch.randn(1, 2048, 8, 128, device=device, dtype=torch.bfloat16) for _ in range(2)]
    expected = flash_attn_with_kvcache(q, *small, cache_seqlens=2000)
    large = [torch.zeros(tokens, 8, 128, device=device, dtype=torch.bfloat16) for _ in range(2)]
    for side, few in zip(large, small, strict=True):
        side[-2048:] = few[0]
    pages = [side.view(-1, 16, 8, 128) for side in large]
    count = pages[0].shape[0]
    table = torch.arange(count - 128, count, dtype=torch.int32, device=device)[None]
    found = flash_attn_with_kvcache(q, *pages, cache_seqlens=2000, block_table=table)
    assert torch.equal(found, expected)
    rows = [side[: tokens // 2048 * 2048].view(-1, 2048, 8, 128) for side in large]
    rows[0][-1], rows[1][-1] = small[0][0], small[1][0]
    last = torch.tensor([len(rows[0]) - 1], dtype=torch.int32, device=device)
    new = [torch.randn(1, 1, 8, 128, device=device, dtype=torch.bfloat16) for _ in range(2)]
    found = flash_attn_with_kvcache(q, *rows, *new, cache_seqlens=1999, cache_batch_idx=last)
    small[0][:, 1999], small[1][:, 1999] = new[0][:, 0], new[1][:, 0]
    assert torch.equal(found, flash_attn_with_kvcache(q, *small, cache_seqlens=2000))
    assert torch.equal(rows[0][-1, 1999], new[0][0, 0])


@pytest.mark.xdist_group("gpu_memory")
def test_strides_whose_products_exceed_two_to_the_31(device):
    """Heads of queries, and new tokens, lie 2^30 elements apart."""
    generator = torch.Generator(device).manual_seed(5)
    apart = torch.empty(3 * 2**30 + 4 * 64, device=device, dtype=torch.bfloat16)
    q = torch.randn(1, 4, 4, 64, device=device, dtype=torch.bfloat16, generator=generator)
    k = torch.randn(1, 4, 1, 64, device=device, dtype=torch.bfloat16, generator=generator)
    expected, found = (torch.zeros(1, 64, 1, 64, device=device, dtype=q.dtype) for _ in range(2))
    options = {"cache_seqlens": 9, "causal": True, "backend": "triton"}
    wanted = flash_attn_with_kvcache(q, expected, expected.clone(), k, k, **options)
    far = apart.as_strided(q.shape, (0, 64, 2**30, 1))
    out = flash_attn_with_kvcache(far.copy_(q), found, found.clone(), k, k, **options)
    assert torch.equal(out, wanted)
    far = apart.as_strided(k.shape, (0, 2**30, 64, 1))
    out = flash_attn_with_kvcache(q, found, found.clone(), far.copy_(k), far, **options)
    assert torch.equal(out, wanted)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("page", [16, 256])
@pytest.mark.parametrize(
    ("requests", "head_dim"), [(3, 128), (16, 128), (40, 128), (40, 64), (20, 256)]
)
def test_shared_prefixes(requests, head_dim, page, device):
    """One, a few and many tiles of rows; prefixes that end inside a split of 1,024 keys."""
    lengths = tuple(2900 + 7 * i for i in range(requests))
    case = KVCase(lengths, new=1, heads=8, heads_k=2, head_dim=head_dim, capacity=4096, page=page)
    case = dataclasses.replace(case, causal=True)
    inputs = make_kv(case, device, torch.bfloat16)
    share(inputs, case, range(requests), 2816)
    found = inputs.call(plan=plan_of(inputs, case, shared_of(inputs, case)))
    exact = plain_kvcache(case, inputs, torch.float64)
    same = plain_kvcache(case, inputs, torch.bfloat16)
    assert_error_at_most_twice(found[0], same[0], exact[0], "out")
    assert_error_at_most_twice(found[1], same[1], exact[1], "lse")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page", [16, 256])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_pages_change_no_bit_of_a_prefill(head_dim, page, softcap, device):
    """Without a softcap the bits are those of the training kernel, too.

    With one, only the training kernel's blocks without a mask fuse its product.
    """
    case = PackedCase(
        *((700, 20, 3), (1500, 20, 140), page), heads=8, head_dim=head_dim, softcap=softcap
    )
    arguments, options, documents = make_call(case, device, torch.bfloat16)
    found = flash_attn_varlen_func(*arguments, backend="triton", **options)
    del options["block_table"]
    k, v = (torch.cat(side) for side in zip(*documents, strict=True))
    q, _, _, cu_q, _, *longest = arguments
    packed = (q, k, v, cu_q, cumulative(case.used, device), *longest)
    contiguous = flash_attn_varlen_func(*packed, backend="triton", **options)
    assert all(map(torch.equal, found, contiguous))
    exact, same = (
        plain(case, arguments, options, documents, dtype)
        for dtype in (torch.float64, torch.bfloat16)
    )
    del options["seqused_k"]
    trained = flash_attn_varlen_func(*packed, backend="triton", **options)
    if softcap == 0:
        assert all(map(torch.equal, found, trained))
    for results in (found, trained):
        for side in (0, 1):
            assert_error_at_most_twice(results[side], same[side], exact[side], ("out", "lse")[side])
