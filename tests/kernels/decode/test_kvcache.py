"""Compares flash_attn_with_kvcache with float64 over a part of FlashAttention's own cases."""

import dataclasses

import pytest
import torch

from tests.kernels.decode.kvcache import KVCase, assert_matches_plain, make_kv

CASES = {
    "one_query": KVCase(),
    "one_query-int": KVCase(lengths=(97, 97), by_int=True, new=1, causal=True),
    "one_query-page16": KVCase(new=1, causal=True, page=16),
    "speculative-page32": KVCase(seqlen_q=5, new=5, causal=True, page=32),
    "more_new_than_queries": KVCase(seqlen_q=2, new=7, causal=True),
    "fewer_new_than_queries": KVCase(seqlen_q=6, new=3, lengths=(0, 120), causal=True, page=16),
    "prefill": KVCase(seqlen_q=37, new=18, causal=True, lengths=(140,)),
    "prefill-page16-full": KVCase(seqlen_q=19, new=19, page=16, lengths=(0, 140)),
    "cross": KVCase(seqlen_q=9, heads_k=4, lengths=(77,)),
    "group3-D20": KVCase(heads=6, heads_k=2, head_dim=20, seqlen_q=3, new=3, causal=True),
    "mqa-D40": KVCase(
        lengths=(30, 140), heads=20, heads_k=1, head_dim=40, new=1, page=16, causal=True
    ),
    "D64-window": KVCase(head_dim=64, window=(33, 0), seqlen_q=4, new=4, page=16),
    "window-right": KVCase(window=(20, 3), seqlen_q=12, new=12, lengths=(77, 3)),
    "alibi-heads": KVCase(alibi="heads", seqlen_q=4, new=4, causal=True, page=32),
    "sink-exact": KVCase(sink=True, seqlen_q=3, split="exact", page=16),
    "rotary": KVCase(rotary=32, seqlen_q=3, new=3, causal=True),
    "rotary-halves": KVCase(rotary=16, interleaved=False, seqlen_q=3, new=3, page=16, causal=True),
    "rotary-not_local": KVCase(rotary=16, seqlen_q=3, new=2),
    "leftpad-page16-rotary": KVCase(
        leftpad=True, page=16, rotary=32, seqlen_q=2, new=2, causal=True
    ),
    "batch_index-leftpad": KVCase(
        batch_index=True, leftpad=True, window=(40, -1), causal=True, seqlen_q=2, new=2
    ),
    "num_splits1": KVCase(num_splits=1, new=1, causal=True),
    "num_splits3": KVCase(num_splits=3, seqlen_q=3, page=16),
    "exact": KVCase(split="exact", seqlen_q=7, new=7, causal=True),
    "everything": KVCase(
        seqlen_q=5,
        new=5,
        heads=6,
        causal=True,
        page=16,
        window=(70, -1),
        softcap=5.0,
        alibi="requests",
        sink=True,
        rotary=16,
        leftpad=True,
    ),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@by_case
def test_the_kernels(case, device, nan_filled_memory):
    assert_matches_plain(case, make_kv(case, device), backend="triton")


@by_case
def test_the_pytorch_path(case):
    assert_matches_plain(case, make_kv(case, "cpu", torch.float32), backend="pytorch")


def test_float32(device):
    case = CASES["everything"]
    assert_matches_plain(case, make_kv(case, device, torch.float32), backend="triton")


def test_strided_operands(device):
    """Queries and new tokens share a tensor, whose columns are apart; the cache has heads first."""
    case = CASES["rotary"]
    inputs = make_kv(case, device)
    packed = torch.cat((inputs.q, inputs.k, inputs.v), 2).mT.contiguous().mT
    inputs.q, inputs.k, inputs.v = packed.split((4, 2, 2), 2)
    for name in ("k_cache", "v_cache"):
        cache = getattr(inputs, name).transpose(1, 2).contiguous().transpose(1, 2)
        setattr(inputs, name, cache)
    assert_matches_plain(case, inputs, backend="triton")


def test_a_full_cache_is_read_without_lengths(device):
    case = KVCase(lengths=(160, 160))
    inputs = make_kv(case, device)
    assert_matches_plain(case, inputs, backend="triton", cache_seqlens=None)


@pytest.mark.parametrize("backend", ["triton", "pytorch"])
def test_no_requests_and_no_queries(backend, device):
    inputs = make_kv(KVCase(lengths=(5, 9)), device)
    inputs.q = inputs.q[:, :0]
    out, lse = inputs.call(backend=backend)
    assert out.shape == (2, 0, 4, 32)
    assert lse.shape == (2, 4, 0)
    inputs.q = torch.empty(0, 1, 4, 32, dtype=torch.float16, device=device)
    inputs.options["cache_seqlens"] = torch.empty(0, dtype=torch.int32, device=device)
    out, lse = inputs.call(backend=backend)
    assert out.shape == (0, 1, 4, 32)
    assert lse.shape == (0, 4, 1)


@pytest.mark.parametrize("backend", ["triton", "pytorch"])
def test_torch_compile_keeps_its_graph_whole(backend, device):
    """The operators declare that they write to the caches; lengths vary without a recompilation."""
    case = KVCase(lengths=(30, 9), new=1, causal=True, page=16)

    def step(inputs):
        first = inputs.call(backend=backend)
        inputs.options["cache_seqlens"] = inputs.options["cache_seqlens"] + 1
        return first[0], inputs.call(backend=backend)[0] * 2, inputs.k_cache.nan_to_num(7.0)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for lengths in ((30, 9), (77, 0)):
        expected, inputs = make_kv(case, device), make_kv(case, device)
        for one in (expected, inputs):
            one.k_cache.nan_to_num_(0.5)
            one.v_cache.nan_to_num_(0.5)
            one.options["cache_seqlens"].copy_(torch.tensor(lengths))
        assert all(map(torch.equal, compiled(inputs), step(expected)))
        assert torch.equal(inputs.k_cache, expected.k_cache)
        assert torch.equal(inputs.v_cache, expected.v_cache)


@pytest.mark.parametrize("backend", ["triton", "pytorch"])
@pytest.mark.parametrize("page", [0, 16])
def test_requests_without_keys_pad_a_batch(page, backend, device):
    case = KVCase(lengths=(30, 30), new=1, causal=True, rotary=16, page=page)
    alone = make_kv(case, device).call(backend=backend)
    inputs = make_kv(case, device)
    inputs.options["cache_seqlens"][0] = -1
    page_and_slot = inputs.places(0, torch.arange(160, device=device))
    before = inputs.k_cache[page_and_slot].nan_to_num(7.0)
    out, lse = inputs.call(backend=backend)
    assert torch.equal(inputs.k_cache[page_and_slot].nan_to_num(7.0), before)
    assert not out[0].any()
    assert (lse[0] == float("-inf")).all()
    assert torch.equal(out[1], alone[0][1])
    assert torch.equal(lse[1], alone[1][1])


def test_a_token_beyond_the_cache_is_not_written(device):
    """The kernels have no lengths on the host: they skip what has no place."""
    from lctrain_kernels.decode.launch import append_tokens
    from lctrain_kernels.decode.structures import KVCache, NewTokens

    for case in (KVCase(new=3), KVCase(new=3, page=16)):
        inputs = make_kv(case, device)
        table = inputs.options.get("block_table")
        lengths = torch.tensor([159, 160, 500, -2], dtype=torch.int32, device=device)
        if table is not None:
            table[0, -1] = 10**6
        before = inputs.k_cache.clone()
        cache = KVCache(inputs.k_cache, inputs.v_cache, lengths, block_table=table)
        append_tokens(cache, NewTokens(inputs.k, inputs.v))
        changed = (inputs.k_cache.nan_to_num(7.0) != before.nan_to_num(7.0)).any(-1).any(-1)
        expected = torch.zeros_like(changed)
        if table is None:
            expected[0, 159] = expected[3, 0] = True
        else:
            expected[table[3, 0].long(), 0] = True
        assert torch.equal(changed, expected)


def test_lengths_of_other_requests_do_not_reach_a_request(device):
    """A request's tokens are NaN: the others have the bits that they have without it."""
    case = dataclasses.replace(CASES["speculative-page32"], lengths=(77, 50, 140))
    inputs = make_kv(case, device)
    clean = inputs.call(backend="triton")
    inputs = make_kv(case, device)
    for tensor in (inputs.k, inputs.v, inputs.q):
        tensor[1] = float("nan")
    page, slot = inputs.places(1, torch.arange(50, device=device))
    inputs.k_cache[page, slot] = inputs.v_cache[page, slot] = float("nan")
    found = inputs.call(backend="triton")
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert a[1].isnan().all()
