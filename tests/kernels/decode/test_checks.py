"""Tests bad arguments of flash_attn_with_kvcache: nothing is written, and the message says why."""

import dataclasses

import pytest
import torch

from lctrain.kernels import flash_attn_with_kvcache, make_decode_plan
from tests.kernels.decode.kvcache import KVCase, make_kv

HALF = torch.float16


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def zeros(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


DENSE = KVCase(lengths=(20, 31), capacity=32, new=1, rotary=8)
PAGED = KVCase(lengths=(20, 31), capacity=32, new=1, page=16)
ROW = (2, 1, 2, 32)
CASES = {
    "q-rank": (DENSE, {"q": zeros(2, 4, 32)}, ValueError, "q must have four dimensions"),
    "q-list": (DENSE, {"q": [1]}, TypeError, "q must be a torch.Tensor, got list"),
    "q-dtype": (
        DENSE,
        {"q": zeros(2, 1, 4, 32, dtype=HALF)},
        TypeError,
        "k_cache must have the dtype of q, torch.float16, got torch.float32",
    ),
    "cache-device": (
        DENSE,
        {"v_cache": zeros(4, 32, 2, 32, device="meta")},
        ValueError,
        "v_cache must be on the device of q, cpu, got meta",
    ),
    "cache-stride": (
        DENSE,
        {"k_cache": zeros(4, 32, 32, 2).transpose(2, 3)},
        ValueError,
        "k_cache must have a last stride of 1",
    ),
    "cache-shapes": (
        DENSE,
        {"v_cache": zeros(4, 31, 2, 32)},
        ValueError,
        "k_cache and v_cache must have one shape",
    ),
    "head_dim": (DENSE, {"q": zeros(2, 1, 4, 16)}, ValueError, "one head dim of at least 1"),
    "heads": (DENSE, {"q": zeros(2, 1, 3, 32)}, ValueError, "a multiple of key/value heads"),
    "rows": (DENSE, {"q": zeros(9, 1, 4, 32)}, ValueError, "k must have shape .9, new tokens"),
    "gradient": (
        DENSE,
        {"q": zeros(2, 1, 4, 32).requires_grad_()},
        ValueError,
        "has no backward, and q requires a gradient",
    ),
    "gradient-new": (
        DENSE,
        {"v": zeros(*ROW).requires_grad_()},
        ValueError,
        "has no backward, and v requires a gradient",
    ),
    "expanded": (
        DENSE,
        {"v_cache": zeros(1, 32, 2, 32).expand(4, -1, -1, -1)},
        ValueError,
        "v_cache must be no expanded tensor if k and v are given, got strides .0,",
    ),
    "k-alone": (DENSE, {"v": None}, ValueError, "k and v must be given together"),
    "cos-alone": (DENSE, {"rotary_sin": None}, ValueError, "must be given together, got one"),
    "no-lengths": (DENSE, {"cache_seqlens": None}, ValueError, "cache_seqlens must be given with"),
    "k-dtype": (DENSE, {"k": zeros(*ROW, dtype=HALF)}, TypeError, "k must have the dtype of q"),
    "v-shape": (DENSE, {"v": zeros(2, 2, 2, 32)}, ValueError, "v must have shape .2, new tokens"),
    "cos-without-k": (DENSE, {"k": None, "v": None}, ValueError, "rotary_cos must come with new k"),
    "cos-shape": (DENSE, {"rotary_cos": zeros(72, 17)}, ValueError, "with R at most 32"),
    "cos-short": (
        DENSE,
        {"rotary_cos": zeros(31, 4), "rotary_sin": zeros(31, 4)},
        ValueError,
        "rotary_cos must have a row per token of the cache .32., got 31",
    ),
    "lengths-dtype": (
        DENSE,
        {"cache_seqlens": torch.tensor([1, 2])},
        TypeError,
        "cache_seqlens must be an int32 tensor, got torch.int64",
    ),
    "lengths-shape": (DENSE, {"cache_seqlens": ints(1)}, ValueError, "must have shape .2., got"),
    "lengths-full": (
        DENSE,
        {"cache_seqlens": ints(20, 32)},
        ValueError,
        r"cache_seqlens\[1\] must be from 0 to 31, got 32.*Nothing was written",
    ),
    "lengths-list": (DENSE, {"cache_seqlens": [20, 31]}, TypeError, "must be an int, an int32"),
    "lengths-int-full": (DENSE, {"cache_seqlens": 32}, ValueError, "from 0 to 31, got 32"),
    "lengths-negative": (
        DENSE,
        {"cache_seqlens": ints(-2, 3)},
        ValueError,
        r"cache_seqlens\[0\] must be at least 0, got -2. .* or -1 for a request without keys",
    ),
    "table-without-columns": (
        PAGED,
        {"block_table": ints(1, 1).view(2, 1)[:, :0]},
        ValueError,
        "k_cache must have room for the 1 new tokens of a request, got 0.* block_table wider",
    ),
    "leftpad": (
        DENSE,
        {"cache_leftpad": ints(0, 32)},
        ValueError,
        r"cache_leftpad\[1\] must be from 0 to 31, got 32",
    ),
    "row": (
        DENSE,
        {"cache_batch_idx": ints(0, 4)},
        ValueError,
        r"cache_batch_idx\[1\] must be from 0 to 3, got 4",
    ),
    "row-twice": (
        DENSE,
        {"cache_batch_idx": ints(1, 1)},
        ValueError,
        "cache_batch_idx must name a row once if k and v are given, got 1 twice",
    ),
    "row-with-pages": (
        PAGED,
        {"cache_batch_idx": ints(0, 1)},
        ValueError,
        "cache_batch_idx must be None with a block_table",
    ),
    "table-shape": (PAGED, {"block_table": ints(1)}, ValueError, "block_table must have shape .2"),
    "table-dtype": (PAGED, {"block_table": zeros(2, 2)}, TypeError, "must be an int32 tensor"),
    "table-range": (
        PAGED,
        {"block_table": torch.stack((ints(0, 1), ints(2, 99)))},
        ValueError,
        r"block_table\[1\] must name pages from 0 to 6, got 99.*Nothing was written",
    ),
    "table-unused": (
        PAGED,
        {"block_table": torch.stack((ints(0, -1), ints(2, 3)))},
        ValueError,
        r"block_table\[0\] must name pages from 0 to 6, got -1",
    ),
    "page-written-twice": (
        PAGED,
        {"block_table": torch.stack((ints(0, 4), ints(2, 4)))},
        ValueError,
        "block_table must name a page for one request if its new tokens are written to it, got "
        "page 4 for 0 and 1. Request 0 would overwrite the other's tokens; nothing was written",
    ),
    "page-written-and-read": (
        PAGED,
        {"block_table": torch.stack((ints(0, 2), ints(2, 4))), "cache_seqlens": ints(20, 31)},
        ValueError,
        "got page 2 for 0 and 1. Request 0 would overwrite",
    ),
    "page": (
        PAGED,
        {"k_cache": zeros(7, 24, 2, 32), "v_cache": zeros(7, 24, 2, 32)},
        ValueError,
        "pages of 16, 32, 64, 128 or 256 tokens, got 24",
    ),
    "window": (DENSE, {"window_size": (1,)}, TypeError, "window_size must be"),
    "softcap": (DENSE, {"softcap": -1.0}, ValueError, "softcap must be finite and >= 0"),
    "alibi": (DENSE, {"alibi_slopes": zeros(3)}, ValueError, "alibi_slopes must have shape"),
    "sink": (DENSE, {"learnable_sink": zeros(3)}, ValueError, "learnable_sink must have shape"),
    "split": (DENSE, {"split": "best"}, ValueError, "split must be one of fixed, exact"),
    "num_splits": (DENSE, {"num_splits": -1}, ValueError, "num_splits must be an int of at least"),
    "num_splits-exact": (
        DENSE,
        {"num_splits": 2, "split": "exact"},
        ValueError,
        "num_splits must be 0 or 1 with split='exact'",
    ),
    "longest": (DENSE, {"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be a Python int"),
    "longest-short": (
        DENSE,
        {"max_seqlen_k": 31},
        ValueError,
        "max_seqlen_k must be at least 32, the keys of request 1, got 31",
    ),
    "backend": (DENSE, {"backend": "hopper"}, ValueError, "backend='hopper'"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_arguments(name):
    case, changes, error, message = CASES[name]
    inputs = make_kv(case, "cpu", torch.float32)
    before = inputs.k_cache.clone()
    arguments = {"q": inputs.q, "k_cache": inputs.k_cache, "v_cache": inputs.v_cache}
    arguments |= {"k": inputs.k, "v": inputs.v, **inputs.options, **changes}
    with pytest.raises(error, match=message):
        flash_attn_with_kvcache(**arguments)
    assert torch.equal(inputs.k_cache.nan_to_num(7.0), before.nan_to_num(7.0))


def test_a_dense_cache_with_too_few_rows():
    with pytest.raises(ValueError, match=r"a row per request \(3\), got 2"):
        flash_attn_with_kvcache(zeros(3, 1, 1, 8), zeros(2, 4, 1, 8), zeros(2, 4, 1, 8))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cache_seqlens": [1]}, TypeError, "cache_seqlens must be an int32 tensor"),
        ({"capacity": 0}, ValueError, "capacity must be an int of at least 1, got 0"),
        ({"capacity": 8.5}, ValueError, "capacity must be an int of at least 1, got 8.5"),
        ({"seqlen_q": True}, ValueError, "seqlen_q must be an int of at least 1, got True"),
        ({"new_tokens": -1}, ValueError, "new_tokens must be an int of at least 0, got -1"),
        ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be a Python int of at least 0"),
        ({"max_seqlen_k": ints(4)}, ValueError, "max_seqlen_k must be a Python int of at least 0"),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be a torch.dtype, got 'bfloat16'"),
        ({"shared_prefixes": 3}, TypeError, "must be SharedPrefixes or None, got int"),
        ({"window_size": 3}, TypeError, "window_size must be"),
        ({"cache_leftpad": torch.zeros(2)}, TypeError, "cache_leftpad must be an int32 tensor"),
        ({"cache_leftpad": ints(1)}, ValueError, r"cache_leftpad must have shape \[B\]"),
    ],
)
def test_bad_arguments_of_a_plan(changes, error, message):
    arguments = {"cache_seqlens": ints(1, 2), "capacity": 8, "head_dim": 8, "dtype": HALF}
    with pytest.raises(error, match=message):
        make_decode_plan(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seqlen_q": 2}, "plan must have the seqlen_q of the call, 1, got 2"),
        ({"new_tokens": 0}, "plan must have the new_tokens of the call, 1, got 0"),
        ({"has_leftpad": True}, "plan must have the cache_leftpad of the call, False, got True"),
        ({"window_left": 8}, "plan must have a left window of at least the call's, 9, got 8"),
        ({"work": torch.zeros(7), "max_splits": 2}, "the requests of the call, 2, got 3"),
        ({"work": torch.zeros(1, device="meta")}, "plan must be on the device of q, cpu, got meta"),
    ],
)
def test_plans_of_other_calls(changes, message):
    """A plan without a split that the call needs would leave the results of the split unset."""
    inputs = make_kv(DENSE, "cpu", torch.float32)
    options = {"causal": True, "window_size": (9, 0)}
    plan = make_decode_plan(
        inputs.options["cache_seqlens"], 32, 32, torch.float32, window_size=(9, 0)
    )
    inputs.call(plan=plan, **options)
    inputs.call(plan=plan._replace(window_left=-1), **options)
    with pytest.raises(ValueError, match=message):
        inputs.call(plan=plan._replace(**changes), **options)


def test_a_plan_of_shorter_requests():
    """Its splits end before the keys of this step do."""
    inputs = make_kv(DENSE, "cpu", torch.float32)
    lengths = inputs.options["cache_seqlens"]
    before = inputs.k_cache.clone()
    inputs.call(plan=make_decode_plan(lengths, 32, 32, torch.float32), causal=True)
    inputs.k_cache.copy_(before)
    plan = make_decode_plan(lengths, 31, 32, torch.float32)
    with pytest.raises(ValueError, match="plan must be for requests of 32 keys, got one for 31"):
        inputs.call(plan=plan, causal=True)
    with pytest.raises(TypeError, match="plan must be a DecodePlan or None, got str"):
        inputs.call(plan="plan", causal=True)
    assert torch.equal(inputs.k_cache.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("name", "padded"), [("cache_seqlens", False), ("cache_seqlens", True), ("cache_leftpad", True)]
)
def test_a_plan_of_another_step(name, padded):
    """Its capacity suffices, but it may list other splits than those that hold the keys."""
    inputs = make_kv(dataclasses.replace(DENSE, leftpad=padded), "cpu", torch.float32)
    lengths = inputs.options["cache_seqlens"].clone()
    pads = inputs.options.get("cache_leftpad")
    plan = make_decode_plan(lengths, 32, 32, torch.float32, cache_leftpad=pads)
    written = inputs.k_cache.clone()
    inputs.options[name] += ints(0, -1)
    with pytest.raises(ValueError, match=f"plan must have the {name} of the call, .* for request"):
        inputs.call(plan=plan, causal=True)
    assert torch.equal(inputs.k_cache.nan_to_num(7.0), written.nan_to_num(7.0))
    inputs.options[name] -= ints(0, -1)
    inputs.call(plan=plan, causal=True)


def overlapping():
    """Returns operands of a call, by a name for what overlaps, and the message."""
    pair = zeros(2, 3, 32, 2, 32).unbind()
    packed = zeros(2, 1, 8, 32)
    whole = zeros(7, 32, 2, 32)
    return {
        "one-cache": ((pair[0], pair[0], packed[:, :, :4]), "k_cache and v_cache"),
        "shifted": ((whole[:4], whole[3:], packed[:, :, :4]), "k_cache and v_cache"),
        "q": ((*pair, pair[0].view(-1)[-256:].view(2, 1, 4, 32)), "k_cache and q"),
        "k": ((*pair, packed[:, :, :4], pair[1][:2, :1], packed[:, :, 6:]), "v_cache and k"),
        "v": ((*pair, packed[:, :, :4], packed[:, :, 6:], pair[1][1:, 3:4]), "v_cache and v"),
    }


@pytest.mark.parametrize("what", overlapping())
def test_operands_that_share_memory_with_a_cache(what):
    (k_cache, v_cache, q, *new), message = overlapping()[what]
    k, v = new or (zeros(2, 1, 2, 32), zeros(2, 1, 2, 32))
    with pytest.raises(ValueError, match=f"{message} must not overlap if k and v are given"):
        flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=4)
    flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=4)  # writes nothing


def test_interleaved_caches_and_packed_operands_do_not_overlap():
    k_cache, v_cache = zeros(2, 32, 2, 2, 32).unbind(2)
    q, k, v = zeros(2, 1, 8, 32).split([4, 2, 2], 2)
    flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=4)


def test_pages_of_keys_and_values_may_lie_in_one_pool():
    """As in transformers' paged cache: keys lie in pages 0, 2, ..., values in the pages after."""
    pool, table = zeros(9, 16, 2, 32), ints(0, 2, 4, 6).view(2, 2)
    torch.nn.init.normal_(pool)
    q, k, v = torch.randn(2, 1, 8, 32).split([4, 2, 2], 2)
    arguments = {"cache_seqlens": ints(20, 9), "block_table": table}
    expected = flash_attn_with_kvcache(q, pool[:-1].clone(), pool[1:].clone(), k, v, **arguments)
    found = flash_attn_with_kvcache(q, pool[:-1], pool[1:], k, v, **arguments)
    assert torch.equal(found, expected)
    written = pool.clone()
    for pages in ((0, 2, 3, 6), (0, 2, 1, 6), (7, 6, 0, 2)):
        arguments["block_table"] = ints(*pages).view(2, 2)
        with pytest.raises(ValueError, match="must name pages whose keys and values share no mem"):
            flash_attn_with_kvcache(q, pool[:-1], pool[1:], k, v, **arguments)
    arguments["block_table"] = table
    for other in (pool[:-1], pool.view(-1)[128:-896].view(8, 16, 2, 32)):
        with pytest.raises(ValueError, match="k_cache and v_cache must not overlap"):
            flash_attn_with_kvcache(q, pool[:-1], other, k, v, **arguments)
    assert torch.equal(pool, written)


def test_one_length_of_all_requests_is_checked_without_reading_a_device(monkeypatch):
    monkeypatch.setattr("lctrain_kernels.decode.checks.reads_values", lambda _: False)
    inputs = make_kv(DENSE, "cpu", torch.float32)
    with pytest.raises(ValueError, match="cache_seqlens must be from 0 to 31, got 32"):
        inputs.call(cache_seqlens=32)
    with pytest.raises(ValueError, match="max_seqlen_k must be at least 21, the keys of all"):
        inputs.call(cache_seqlens=20, max_seqlen_k=20)


def test_the_switch_reads_values_on_a_gpu(monkeypatch):
    from lctrain_kernels import checks

    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not checks.reads_values(gpu)
    monkeypatch.setenv(checks.SWITCH, "1")
    assert checks.reads_values(gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not checks.reads_values(gpu)
