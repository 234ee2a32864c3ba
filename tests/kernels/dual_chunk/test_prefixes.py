"""Tests dual chunk attention to prefixes that several requests share."""

from dataclasses import replace

import pytest
import torch

from lctrain_kernels.decode import aot as decode_aot
from lctrain_kernels.decode.launch_config import (
    DecodeConfig,
    override_decode_config,
    table_config,
)
from lctrain_kernels.decode.structures import KVCache, SharedPrefixes
from lctrain_kernels.dual_chunk import aot, cached, prefix_launch
from lctrain_kernels.tile.config import TileConfig
from tests.kernels.decode.kvcache import KVCase, make_kv
from tests.kernels.decode.sharing import plan_of, share, shared_of
from tests.kernels.dual_chunk.test_cached import call, plain
from tests.kernels.launches import describe_for_a_compiler, launches_of
from tests.numerics import assert_error_at_most_twice

HALF = torch.float16
PAGED = KVCase(lengths=(150, 135, 20, 129), capacity=160, new=1, page=16, head_dim=16)
SPLITS = DecodeConfig(
    TileConfig(16, 32, 4, 1), 64, shared_tiles=(TileConfig(32, 32, 4, 1),), merge_rows=16
)
# (case, chunk_size, local_size, shared prefix): positions 129 to 150 in chunks of 16, 24, 40, ...
CASES = {
    "one_chunk": (replace(PAGED, lengths=(150, 147, 20, 145)), 24, 8, 128),
    "several_chunks": (PAGED, 24, 8, 128),
    "chunk_border_inside_a_block": (PAGED, 50, 10, 128),
    "no_local_tokens": (replace(PAGED, page=64, capacity=192), 48, 0, 128),
    "more_local_tokens_than_a_chunk": (replace(PAGED, page=32), 24, 20, 64),
    "all_in_the_own_chunk": (replace(PAGED, heads=2), 200, 10, 128),
    "speculative": (replace(PAGED, seqlen_q=3, new=3, lengths=(150, 126, 20, 128)), 43, 11, 64),
}


def shared_plan(inputs, case):
    return plan_of(inputs, case, shared_of(inputs, case))


@pytest.fixture(params=[64, 128])
def size(request):
    with override_decode_config(replace(SPLITS, split_size=request.param)):
        yield


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name, size, device, nan_filled_memory):
    case, chunk_size, local_size, tokens = CASES[name]
    inputs = make_kv(case, device)
    share(inputs, case, (0, 1, 3), tokens)
    plan = shared_plan(inputs, case)
    assert plan.shared.groups.tolist() == [[0, 3, tokens]]
    scale = torch.tensor([1.3, 1.0, 0.8, 1.1], device=device) if case is PAGED else None
    sizes = (chunk_size, local_size, scale)
    out, lse = call(inputs, "triton", *sizes, plan=plan)
    exact, same = (plain(case, inputs, dtype, *sizes) for dtype in (torch.float64, HALF))
    assert_error_at_most_twice(out, same[0], exact[0], "out")
    assert_error_at_most_twice(lse, same[1], exact[1], "lse")
    # A request without a group keeps the bits that it has without the plan.
    apart = call(inputs, "triton", *sizes)
    assert torch.equal(out[2], apart[0][2])
    assert torch.equal(lse[2], apart[1][2])


def test_a_prefix_is_read_on_the_pages_of_one_request(device, monkeypatch):
    """The pages that other requests name for it could hold anything."""
    inputs, (case, *sizes, tokens) = make_kv(PAGED, device), CASES["chunk_border_inside_a_block"]
    share(inputs, case, (0, 1, 3), tokens)
    plan = shared_plan(inputs, case)
    expected = call(inputs, "triton", *sizes, plan=plan)
    monkeypatch.setattr(cached, "check_shared_pages", lambda *_: None)
    table = inputs.options["block_table"]
    unused = set(range(len(inputs.k_cache))) - set(table.flatten().tolist())
    table[1, : tokens // case.page] = table[3, : tokens // case.page] = max(unused)  # all NaN
    found = call(inputs, "triton", *sizes, plan=plan)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_request_reaches_no_sibling(device):
    """A request's suffix and queries are NaN: the others of its group keep their bits."""
    clean, inputs = make_kv(PAGED, device), make_kv(PAGED, device)
    for one in (clean, inputs):
        share(one, PAGED, (0, 1, 3), 128)
    plan = shared_plan(clean, PAGED)
    expected = call(clean, "triton", 24, 8, plan=plan)
    for tensor in (inputs.q, inputs.k, inputs.v):
        tensor[1] = float("nan")
    page, slot = inputs.places(1, torch.arange(128, 135, device=device))
    inputs.k_cache[page, slot] = inputs.v_cache[page, slot] = float("nan")
    prefix = inputs.options["block_table"][0, :8].long()
    before = inputs.k_cache[prefix].clone()
    found = call(inputs, "triton", 24, 8, plan=plan)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])
        assert a[1].isnan().all()
    assert torch.equal(inputs.k_cache[prefix], before)


def test_a_request_that_left_its_group_is_empty(device):
    """A request without keys, with which a batch is padded, may still be named in a group."""
    inputs = make_kv(PAGED, device)
    share(inputs, PAGED, (0, 1, 3), 128)
    plan = shared_plan(inputs, PAGED)
    expected = call(inputs, "triton", 24, 8, plan=plan)
    inputs.options["cache_seqlens"][1] = -1
    out, lse = call(inputs, "triton", 24, 8, plan=plan_of(inputs, PAGED, plan.shared))
    assert torch.equal(out[[0, 2, 3]], expected[0][[0, 2, 3]])
    assert not out[1].any()
    assert (lse[1] == float("-inf")).all()


def test_groups_without_members_are_skipped(device):
    """A captured step has room for more and longer groups than a replay has."""
    inputs = make_kv(PAGED, device)
    share(inputs, PAGED, (0, 1, 3), 128)
    shared = shared_of(inputs, PAGED)
    expected = call(inputs, "triton", 24, 8, plan=plan_of(inputs, PAGED, shared))
    empty = torch.cat((shared.groups, torch.zeros_like(shared.groups)))
    wide = shared._replace(groups=empty, longest=1024, most=4)
    found = call(inputs, "triton", 24, 8, plan=plan_of(inputs, PAGED, wide))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_pytorch_computes_every_request_alone(device):
    inputs = make_kv(PAGED, device, torch.float32)
    share(inputs, PAGED, (0, 1, 3), 128)
    found = call(inputs, "pytorch", 24, 8, plan=shared_plan(inputs, PAGED))
    expected = call(inputs, "pytorch", 24, 8)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_results_of_splits_take_a_bounded_memory(device, monkeypatch):
    """Longer splits are fewer: here one of 128 keys in place of two."""
    inputs = make_kv(PAGED, device)
    share(inputs, PAGED, (0, 1, 3), 128)
    one = 4 * inputs.q.numel()  # bytes of one split of all requests
    attend, launch, grids = prefix_launch.attend_prefixes, prefix_launch.launch, []

    def bounded(*arguments):
        return attend(*arguments, most_bytes=one)

    def remembered(kernel, grid):
        grids.append(grid)
        return launch(kernel, grid)

    monkeypatch.setattr(prefix_launch, "launch", remembered)
    results = []
    for function in (attend, bounded):
        monkeypatch.setattr(prefix_launch, "attend_prefixes", function)
        with override_decode_config(SPLITS):
            results.append(call(inputs, "triton", 24, 8, plan=shared_plan(inputs, PAGED))[0])
    assert grids[0] == (2 * grids[2][0],)
    exact, same = (plain(PAGED, inputs, dtype, 24, 8, None)[0] for dtype in (torch.float64, HALF))
    for found in results:
        assert_error_at_most_twice(found, same, exact, "out")


def test_variants_are_what_is_launched(monkeypatch):
    for module in (aot, decode_aot):
        describe_for_a_compiler(module, monkeypatch)
        kernels = {name: getattr(module, f"{name}_kernel") for name in module.KERNELS}
        monkeypatch.setattr(module, "KERNELS", kernels)
    launches = launches_of(prefix_launch, monkeypatch)
    config, dtype = table_config("sm_90", 128), torch.bfloat16
    q = torch.empty(3, 64, 1, 64, 128, dtype=dtype, device="meta")
    k = torch.empty(99, 16, 16, 128, dtype=dtype, device="meta")
    zeros = torch.zeros(64, dtype=torch.int32)
    cache = KVCache(k, k, zeros, block_table=torch.zeros(64, 256, dtype=torch.int32))
    ranges = torch.zeros(3, 64, 1, dtype=torch.int32)
    *tiles, merge = aot.prefix_variants("sm_90", 128)
    for members, variant in zip((4, 16, 64), tiles, strict=True):
        shared = SharedPrefixes(zeros, zeros, zeros[:3].view(1, 3), longest=2048, most=members)
        with override_decode_config(config):
            prefix_launch.attend_prefixes(q, cache, ranges, ranges, shared, 0.1)
        launches["dual_chunk_prefix_kernel"].assert_described_by(variant)
        launches["decode_merge_kernel"].assert_described_by(merge)


def test_opcheck(device):
    """Checks the schema and the fake implementation of the operator."""
    inputs = make_kv(PAGED, device)
    share(inputs, PAGED, (0, 1, 3), 128)
    q = torch.randn(3, 4, 1, 4, 16, device=device).half()
    starts = torch.zeros(3, 4, 1, dtype=torch.int32, device=device)
    cache = (inputs.k_cache, inputs.v_cache, starts[0, :, 0] + 128, inputs.options["block_table"])
    torch.library.opcheck(
        torch.ops.lctrain.dual_chunk_prefixes.default,
        (q, *cache, starts, starts + 40, *shared_of(inputs, PAGED), 0.25),
        test_utils=("test_schema", "test_faketensor"),
    )
