"""Compares the ahead-of-time variants of the decode kernels with their launches."""

import pytest
import torch

from lctrain_kernels.decode import aot, launch, launch_plan
from lctrain_kernels.decode.launch_config import TABLES, override_decode_config, table_config
from lctrain_kernels.decode.structures import (
    DecodeOptions,
    DecodePlan,
    KVCache,
    NewTokens,
    PackedQueries,
    SharedPrefixes,
)
from lctrain_kernels.tile.config import override_configs
from lctrain_kernels.tile.config import table_config as varlen_config
from tests.kernels.launches import describe_for_a_compiler, launches_of

HEADS_K, REQUESTS = 16, 64


@pytest.fixture
def launches(monkeypatch):
    """Records launches, and lets the ahead-of-time list compile although the interpreter is on."""
    describe_for_a_compiler(aot, monkeypatch)
    kernels = {name: getattr(aot, f"{name}_kernel") for name in aot.KERNELS}
    monkeypatch.setattr(aot, "KERNELS", kernels)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    return launches_of(launch, monkeypatch) | launches_of(launch_plan, monkeypatch)


def operands(case: aot.DecodeCase, head_dim: int):
    """Returns (q, cache, new tokens, options) of a call that a case describes."""
    dtype, group = torch.bfloat16, aot.GROUP
    page = case.page or 4096
    rows = 16 * REQUESTS if case.page else REQUESTS
    k = torch.empty(rows, page, HEADS_K, head_dim, dtype=dtype, device="meta")
    new_k = torch.empty(REQUESTS, 1, HEADS_K, head_dim, dtype=dtype, device="meta")
    q = torch.empty(REQUESTS, 1, HEADS_K * group, head_dim, dtype=dtype, device="meta")
    lengths = torch.zeros(REQUESTS, dtype=torch.int32)
    table = torch.zeros(REQUESTS, 256, dtype=torch.int32) if case.page else None
    cache, new = KVCache(k, k, lengths, block_table=table), NewTokens(new_k, new_k)
    options = DecodeOptions(0.1, window_right=0)
    if case.everything:
        cos = torch.zeros(16384, head_dim // 2, dtype=dtype)
        new = new._replace(cos=cos, sin=cos)
        cache = cache._replace(leftpad=lengths)
        floats = torch.zeros(HEADS_K * group)
        options = options._replace(
            window_left=9, softcap=2.0, alibi_slopes=floats, learnable_sink=floats
        )
    return q, cache, new, options


@pytest.mark.parametrize("case", [aot.DENSE, aot.PAGED, aot.ALL], ids=lambda case: case.name)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_variants_are_what_is_launched(case, head_dim, launches):
    config = table_config("sm_90", head_dim)
    q, cache, new, options = operands(case, head_dim)
    plan = None
    if not case.everything:
        plan = DecodePlan(torch.zeros(9, dtype=torch.int32), 8, 512, 1, 1, -1)
    merge, append, plan_variant = aot.small_variants(case, head_dim, config)
    with override_decode_config(config):
        launch.append_tokens(cache, new)
        launch.decode_attention(q, cache, new, options, plan, longest=4000)
        launches["decode_append_kernel"].assert_described_by(append)
        launches["decode_split_kernel"].assert_described_by(
            aot.split_variant(case, head_dim, config)
        )
        launches["decode_merge_kernel"].assert_described_by(merge)
        whole = options._replace(num_splits=0)
        launch.decode_attention(q, cache, new, whole, longest=config.split_size)
        launches["decode_whole_kernel"].assert_described_by(
            aot.whole_variant(case, head_dim, config)
        )
        exact = varlen_config("sm_90", "varlen_fwd", head_dim, aot.GROUP)
        with override_configs(varlen_fwd=exact):
            launch.decode_attention(q, cache, new, options._replace(split="exact"))
        launches["decode_whole_kernel"].assert_described_by(
            aot.whole_variant(case, head_dim, config, exact)
        )
    launch_plan.fill_plan(cache.seqlens, cache.leftpad, 4096, 512, window_left=options.window_left)
    launches["decode_plan_kernel"].assert_described_by(plan_variant)


def test_variants_of_packed_queries_and_shared_prefixes(launches):
    head_dim, requests = 128, REQUESTS
    config = table_config("sm_90", head_dim)
    q, cache, _, options = operands(aot.PACKED, head_dim)
    new, zeros = NewTokens(), torch.zeros(requests + 1, dtype=torch.int32)
    exact = varlen_config("sm_90", "varlen_fwd", head_dim, aot.GROUP)
    plan = DecodePlan(zeros, 8, 512, 1, 1, -1)
    packed = PackedQueries(zeros, 1)
    with override_decode_config(config), override_configs(varlen_fwd=exact):
        launch.decode_attention(q[:, 0], cache, new, options, plan, 4000, packed)
        assert_described(launches, "decode_split", aot.split_variant(aot.PACKED, head_dim, config))
        assert_described(launches, "decode_merge", aot.merge_variant(aot.PACKED, head_dim, config))
        whole = options._replace(split="exact")
        launch.decode_attention(q[:, 0], cache, new, whole, None, 4000, packed)
        variant = aot.whole_variant(aot.PACKED, head_dim, config, exact)
        assert_described(launches, "decode_whole", variant)
        variants = aot.prefix_variants(aot.SHARED, head_dim, config)
        for members, variant in zip((4, 16, 64), variants, strict=True):
            shared = SharedPrefixes(
                *(zeros[:requests], zeros, zeros[:3].view(1, 3)), longest=2048, most=members
            )
            plan = plan._replace(shared=shared)
            launch.decode_attention(q, cache, new, options, plan, 4000)
            assert_described(launches, "decode_prefix", variant)
        assert_described(launches, "decode_split", aot.split_variant(aot.SHARED, head_dim, config))
        assert_described(launches, "decode_merge", aot.merge_variant(aot.SHARED, head_dim, config))
    launch_plan.fill_plan(cache.seqlens, None, 4096, 512, shared=shared)
    assert_described(launches, "decode_plan", aot.plan_variant(aot.SHARED, head_dim, config))


def test_variants_of_differential_attention(launches):
    config = table_config("sm_90", 128)
    q, cache, _, options = operands(aot.DIFFERENTIAL, 128)
    plan = DecodePlan(torch.zeros(9, dtype=torch.int32), 8, 512, 1, 0, -1)
    options = options._replace(wide=True, halves=True)
    with override_decode_config(config):
        launch.decode_attention(q.repeat(1, 1, 2, 1), cache, NewTokens(), options, plan, 4000)
    for kernel in ("split", "merge"):
        variant = getattr(aot, f"{kernel}_variant")(aot.DIFFERENTIAL, 128, config)
        assert_described(launches, f"decode_{kernel}", variant)


def test_variants_of_shared_prefixes_of_differential_attention(launches):
    config, case = table_config("sm_90", 128), aot.SHARED_DIFFERENTIAL
    q, cache, _, options = operands(case, 128)
    zeros = torch.zeros(REQUESTS, dtype=torch.int32)
    options = options._replace(wide=True, halves=True)
    for members, variant in zip((2, 8, 64), aot.prefix_variants(case, 128, config), strict=True):
        shared = SharedPrefixes(zeros, zeros, zeros[:3].view(1, 3), longest=2048, most=members)
        plan = DecodePlan(torch.zeros(9, dtype=torch.int32), 8, 512, 1, 0, -1, shared=shared)
        with override_decode_config(config):
            launch.decode_attention(q.repeat(1, 1, 2, 1), cache, NewTokens(), options, plan, 4000)
        assert_described(launches, "decode_prefix", variant)


def assert_described(launches, kernel, variant):
    launches[f"{kernel}_kernel"].assert_described_by(variant)


@pytest.mark.parametrize("table", TABLES)
def test_splits_are_whole_blocks_and_merge_programs_whole_tiles(table):
    for config in TABLES[table].values():
        assert config.split_size % config.tile.block_n == 0
        assert config.tile.block_m % config.merge_rows == 0
