"""Tests prefixes that several requests share: the groups, the results, and the isolation."""

import dataclasses

import pytest
import torch

from lctrain.kernels import make_decode_plan, make_shared_prefixes
from lctrain_kernels.decode.launch_config import DecodeConfig, decode_config, override_decode_config
from lctrain_kernels.tile.config import TileConfig
from tests.kernels.decode.kvcache import KVCase, make_kv, plain_kvcache
from tests.kernels.decode.sharing import plan_of, share, shared_of
from tests.numerics import assert_error_at_most_twice

HALF = torch.float16
PAGED = KVCase(lengths=(150, 135, 20, 129), capacity=160, new=1, causal=True, page=16)
CASES = {
    "one_query": PAGED,
    "speculative-rotary": dataclasses.replace(
        PAGED, seqlen_q=3, new=3, lengths=(150, 135, 20, 128), rotary=16
    ),
    "page32-window": dataclasses.replace(PAGED, page=32, window=(60, 0), softcap=4.0),
    "page64-everything": dataclasses.replace(
        PAGED, page=64, capacity=192, alibi="requests", sink=True, window=(120, 0), heads=6
    ),
    "not_causal": dataclasses.replace(PAGED, causal=False, seqlen_q=2, new=0, heads_k=4),
}


@pytest.fixture
def split(request):
    """Splits that end with the prefix of 128 tokens, and splits of which a prefix is a part."""
    tiles = TileConfig(16, 32, 4, 1), (TileConfig(32, 32, 4, 1),)
    with override_decode_config(
        DecodeConfig(
            tiles[0],
            request.param,
            prefetch_pages=request.param == 128,
            shared_tiles=tiles[1],
            merge_rows=16,
            merge_unroll=2,
        )
    ):
        yield request.param


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("one_query", 64),
        ("speculative-rotary", 128),
        ("page32-window", 64),
        ("page64-everything", 128),
        ("not_causal", 64),
    ],
    indirect=["split"],
)
def test_matches_float64(name, split, device, nan_filled_memory):
    case = CASES[name]
    inputs = make_kv(case, device)
    tokens = 64 if split == 128 else 128
    share(inputs, case, (0, 1, 3), tokens)
    shared = shared_of(inputs, case)
    assert shared.longest == tokens
    assert shared.members.tolist() == [0, 1, 3]
    found = inputs.call(backend="triton", plan=plan_of(inputs, case, shared))
    exact = plain_kvcache(case, inputs, torch.float64)
    same = plain_kvcache(case, inputs, HALF)
    assert_error_at_most_twice(found[0], same[0], exact[0], "out")
    assert_error_at_most_twice(found[1], same[1], exact[1], "lse")


def test_a_split_of_prefix_and_suffix_is_computed_once_each(device):
    """The plan lists the splits of suffixes, counted from the end of the prefix."""
    inputs = make_kv(PAGED, device)
    share(inputs, PAGED, (0, 1, 3), 64)
    config = dataclasses.replace(decode_config(inputs.q), split_size=128)
    with override_decode_config(config):
        plan = plan_of(inputs, PAGED, shared_of(inputs, PAGED))
    assert plan.max_splits == 3
    # Slot 0 holds the prefix. The suffixes have 87, 72 and 66 keys: slot 1; request 2 has slot 0.
    assert plan.work[: 1 + int(plan.work[0])].tolist() == [4, 1, 4, 6, 10]


def test_a_request_reaches_no_sibling(device):
    """A request's suffix and queries are NaN: the others of its group keep their bits."""
    clean, inputs = make_kv(PAGED, device), make_kv(PAGED, device)
    for one in (clean, inputs):
        share(one, PAGED, (0, 1, 3), 128)
    shared = shared_of(clean, PAGED)
    expected = clean.call(backend="triton", plan=plan_of(clean, PAGED, shared))
    for tensor in (inputs.q, inputs.k, inputs.v):
        tensor[1] = float("nan")
    page, slot = inputs.places(1, torch.arange(128, 135, device=device))
    inputs.k_cache[page, slot] = inputs.v_cache[page, slot] = float("nan")
    before = inputs.k_cache[inputs.options["block_table"][0, :8].long()].clone()
    found = inputs.call(backend="triton", plan=plan_of(inputs, PAGED, shared))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])
        assert a[1].isnan().all()
    after = inputs.k_cache[inputs.options["block_table"][0, :8].long()]
    assert torch.equal(after, before)


def test_a_request_that_left_its_group_is_empty(device):
    """A request without keys, with which a batch is padded, may still be named in a group."""
    inputs = make_kv(PAGED, device)
    share(inputs, PAGED, (0, 1, 3), 128)
    plan = plan_of(inputs, PAGED, shared_of(inputs, PAGED))
    expected = inputs.call(backend="triton", plan=plan)
    inputs.options["cache_seqlens"][1] = -1
    plan = plan_of(inputs, PAGED, plan.shared)
    out, lse = inputs.call(backend="triton", plan=plan)
    assert torch.equal(out[[0, 2, 3]], expected[0][[0, 2, 3]])
    assert not out[1].any()
    assert (lse[1] == float("-inf")).all()


def rows(*texts: str) -> list[list[int]]:
    """Returns page tables whose pages are named by letters."""
    return [[ord(letter) for letter in text] for text in texts]


def groups_of(table, lengths, page, **options):
    """Returns {tuple of requests: tokens} of the groups that are found."""
    shared = make_shared_prefixes(table, lengths, page, **options)
    if shared is None:
        return {}
    members = shared.members.tolist()
    found = {
        tuple(members[first : first + count]): tokens
        for first, count, tokens in shared.groups.tolist()
    }
    assert shared.longest == max(found.values())
    assert shared.most == max(map(len, found))
    for requests, tokens in found.items():
        assert all(shared.prefix[request] == tokens for request in requests)
    return found


@pytest.mark.parametrize(
    ("table", "lengths", "page", "expected"),
    [
        (rows("abcd"), (256,), 64, {}),
        (rows("abcd", "efgh"), (256, 256), 64, {}),
        (rows("abcd", "abed"), (256, 256), 64, {(0, 1): 128}),
        (rows("abcd", "abcd"), (256, 191), 64, {(0, 1): 128}),  # page c is not full
        (rows("abcd", "abcd"), (256, -1), 64, {}),
        (rows("abc", "abd", "xyz", "xyw"), (192,) * 4, 64, {(0, 1): 128, (2, 3): 128}),
        # All share one page, or two pairs share three.
        (rows("abcd", "abce", "axyd", "axye"), (256,) * 4, 64, {(0, 1): 192, (2, 3): 192}),
        (rows("abcd", "abde", "abxd", "aqye"), (256,) * 4, 64, {(0, 1, 2): 128}),
        (rows("abcde", "abcdf", "abcdg"), (80,) * 3, 16, {(0, 1, 2): 64}),
        (rows("abcdefg", "abcdefh"), (112,) * 2, 16, {(0, 1): 64}),  # 96, and 64 of whole blocks
        (rows("abc", "abd"), (48,) * 2, 16, {}),
    ],
)
def test_groups_are_those_that_save_most(table, lengths, page, expected):
    assert groups_of(table, lengths, page) == expected


def test_a_long_chain_of_prefixes_is_no_deep_recursion():
    """Row i shares i + 1 pages with each row after it; pages are as large as a block of keys."""
    count = 1100
    table = [[*range(i + 1), count + i] for i in range(count)]
    found = groups_of(table, [64 * len(row) for row in table], 64)
    half = count // 2
    assert found == {tuple(range(half - 1, count)): 64 * half}


def test_groups_may_be_given_and_short_prefixes_left_out():
    table, lengths = rows("abc", "abd", "abe"), (192,) * 3
    assert groups_of(table, lengths, 64, groups=[(2, 0)]) == {(2, 0): 128}
    assert groups_of(table, lengths, 64, groups=[(1,), ()]) == {}
    assert groups_of(table, lengths, 64, min_tokens=129) == {}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cache_seqlens": [1]}, ValueError, r"a row per request \(1\)"),
        ({"page": 0}, ValueError, "pages of at least one token, got 2 rows and pages of 0"),
        ({"page": 64.0}, ValueError, "pages of at least one token, got 2 rows and pages of 64.0"),
        (
            {"block_table": [[3, 4], [3, -1]]},
            ValueError,
            r"block_table\[1\] must name pages of at least 0, got -1 among the first 2. Allocate",
        ),
        (
            {"cache_seqlens": [128, 129]},
            ValueError,
            r"block_table\[1\] must name the 3 pages of 129 tokens, got 2. Pass the lengths",
        ),
        (
            {"block_table": [[0.5, 1], [2, 3]]},
            TypeError,
            r"block_table\[0\] must be a list of page numbers, which are integers, got torch.fl",
        ),
        ({"min_tokens": "64"}, ValueError, "min_tokens must be an int, got '64'. Pass a number"),
        ({"groups": 5}, TypeError, r"groups must be lists of requests, which are ints, got 5. Wri"),
        ({"groups": [(0, 1.0)]}, TypeError, "groups must be lists of requests, which are ints"),
        ({"groups": [(0, 2)]}, ValueError, "requests from 0 to 1, each once, got 2. Name"),
        ({"groups": [(0, 1), (1,)]}, ValueError, "each once, got 1 twice"),
        (
            {"block_table": torch.zeros(2, 2, device="meta")},
            TypeError,
            "block_table must be on the CPU, got meta",
        ),
    ],
)
def test_bad_arguments(changes, error, message):
    arguments = {"block_table": rows("ab", "ac"), "cache_seqlens": [128, 128], "page": 64}
    with pytest.raises(error, match=message):
        make_shared_prefixes(**arguments | changes)


def test_plans_that_do_not_fit():
    inputs = make_kv(PAGED, "cpu", torch.float32)
    share(inputs, PAGED, (0, 1, 3), 128)
    shared = shared_of(inputs, PAGED)
    lengths = inputs.options["cache_seqlens"]
    sizes = (160, 32, torch.float32)
    plan = make_decode_plan(lengths, *sizes, shared_prefixes=shared)
    inputs.call(plan=plan)
    with pytest.raises(ValueError, match="shared_prefixes must be for 3 requests on cpu"):
        make_decode_plan(lengths[:3], *sizes, shared_prefixes=shared)
    with pytest.raises(ValueError, match="cache_leftpad must be None with shared_prefixes"):
        make_decode_plan(lengths, *sizes, shared_prefixes=shared, cache_leftpad=lengths)
    inputs.options["block_table"][3, 5] = 0
    with pytest.raises(ValueError, match="got 128 tokens that request 3 does not share with req"):
        inputs.call(plan=plan)
    dense = make_kv(dataclasses.replace(PAGED, page=0), "cpu", torch.float32)
    with pytest.raises(ValueError, match="block_table must be given with a plan of shared"):
        dense.call(plan=plan)


def test_blocks_of_keys_end_with_the_prefix():
    config = DecodeConfig(TileConfig(16, 128, 4, 1), 128)
    with pytest.raises(ValueError, match=r"must divide 64 for shared prefixes, got \[128\]"):
        config.tile_of_rows(16)
