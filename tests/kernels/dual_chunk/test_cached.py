"""Compares dual chunk attention over a cache with float64."""

from dataclasses import replace

import pytest
import torch

from lctrain.kernels import dual_chunk_attn_varlen_func, dual_chunk_attn_with_kvcache
from lctrain_kernels.dual_chunk.reference import dense_dual_chunk_attention
from tests.kernels.decode.kvcache import KVCase, make_kv
from tests.kernels.oracle import cumulative
from tests.numerics import assert_equal_in_float64, assert_error_at_most_twice

HALF = torch.float16
ONE = KVCase(lengths=(77, 0, 23), capacity=96, new=1, head_dim=16, heads=2, heads_k=1)
CASES = {
    "one_query": (ONE, 24, 8),
    "page16-scaled": (replace(ONE, page=16), 24, 20),
    "leftpad-page32": (replace(ONE, page=32, leftpad=True), 40, 0),
    "few_queries": (replace(ONE, seqlen_q=2, new=2, batch_index=True, leftpad=True), 19, 3),
    "first_queries": (replace(ONE, lengths=(0, 2), seqlen_q=3, new=2), 24, 8),
    "short": (ONE, 200, 10),
}


def call(inputs, backend, chunk_size, local_size, scale=None, plan=None):
    places = ("cache_seqlens", "cache_leftpad", "cache_batch_idx", "block_table")
    options = {name: inputs.options[name] for name in places if name in inputs.options}
    return dual_chunk_attn_with_kvcache(
        *(inputs.q, inputs.k_cache, inputs.v_cache, inputs.k, inputs.v),
        inv_freq=frequencies(inputs.q),
        chunk_size=chunk_size,
        local_size=local_size,
        logit_scale=scale,
        return_softmax_lse=True,
        plan=plan,
        backend=backend,
        **options,
    )


def frequencies(q):
    return 100.0 ** (-torch.arange(0, q.shape[-1], 2, device=q.device).float() / q.shape[-1])


def plain(case, inputs, dtype, chunk_size, local_size, scale):
    outs, lses = [], []
    for request, stored in enumerate(case.lengths):
        pad = stored // 3 if case.leftpad else 0
        k, v = (
            torch.cat((side[request, pad:stored], new[request])).to(dtype)
            for side, new in ((inputs.keys, inputs.k), (inputs.values, inputs.v))
        )
        out, lse = dense_dual_chunk_attention(
            *(inputs.q[request].to(dtype), k, v),
            inv_freq=frequencies(inputs.q),
            chunk_size=chunk_size,
            local_size=local_size,
            logit_scale=1.0 if scale is None else float(scale[request]),
        )
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize("backend", ["triton", "pytorch"])
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name, backend, device, nan_filled_memory):
    case, chunk_size, local_size = CASES[name]
    inputs = make_kv(case, device)
    scale = torch.tensor([1.3, 1.0, 0.8], device=device) if "scaled" in name else None
    out, lse = call(inputs, backend, chunk_size, local_size, scale)
    sizes = (chunk_size, local_size, scale)
    exact, same = (plain(case, inputs, dtype, *sizes) for dtype in (torch.float64, HALF))
    assert_error_at_most_twice(out, same[0], exact[0], "out")
    seen = exact[1] > float("-inf")
    assert torch.equal(lse > float("-inf"), seen)
    assert_error_at_most_twice(lse[seen], same[1][seen], exact[1][seen], "lse")


def test_tokens_one_by_one_equal_the_training_forward(device):
    """In float64, so that only the formulas differ."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(60, n, 16, generator=generator).double() for n in (4, 2, 2))
    cu = cumulative([60], torch.device("cpu"))
    options = {"inv_freq": frequencies(q), "chunk_size": 14, "local_size": 5}
    expected = dual_chunk_attn_varlen_func(q, k, v, cu, 60, **options)
    cache = [torch.full((1, 60, 2, 16), float("nan"), dtype=torch.float64) for _ in range(2)]
    found = [
        dual_chunk_attn_with_kvcache(
            *(x[None, i : i + 1] if x is q else cache[x is v] for x in (q, k, v)),
            *(x[None, i : i + 1] for x in (k, v)),
            cache_seqlens=i,
            **options,
        )[0]
        for i in range(60)
    ]
    assert_equal_in_float64(torch.cat(found), expected)


def test_requests_do_not_reach_each_other(device):
    case, chunk_size, local_size = CASES["one_query"]
    clean, inputs = make_kv(case, device), make_kv(case, device)
    expected = call(clean, "triton", chunk_size, local_size)
    for tensor in (inputs.q, inputs.k, inputs.v):
        tensor[2] = float("nan")
    found = call(inputs, "triton", chunk_size, local_size)
    others = [0, 1]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(found, expected, strict=True))
    assert found[0][2].isnan().all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"local_size": 24}, ValueError, "local_size must be at least 0 and below chunk_size"),
        ({"inv_freq": torch.ones(3)}, ValueError, "inv_freq must have shape .8."),
        ({"logit_scale": torch.ones(4)}, ValueError, "logit_scale must have shape .3."),
        ({"softmax_scale": 0.0}, ValueError, "softmax_scale must be finite and > 0"),
        ({"backend": "hopper"}, ValueError, "backend='hopper', which has no decode kernels"),
        ({"plan": "x"}, TypeError, "plan must be a DecodePlan or None, got str. Pass the result"),
        ({"cache_seqlens": 96}, ValueError, "cache_seqlens must be from 0 to 95, got 96"),
        (
            {"q": torch.zeros(3, 1, 2, 16).requires_grad_()},
            ValueError,
            "dual_chunk_attn_with_kvcache has no backward, and q requires a gradient.*"
            "train with dual_chunk_attn_varlen_func",
        ),
    ],
)
def test_bad_arguments(changes, error, message):
    inputs = make_kv(ONE, "cpu", torch.float32)
    before = inputs.k_cache.nan_to_num(7.0)
    arguments = {"q": inputs.q, "k_cache": inputs.k_cache, "v_cache": inputs.v_cache}
    arguments |= {"k": inputs.k, "v": inputs.v, "inv_freq": frequencies(inputs.q)}
    arguments |= {"cache_seqlens": 3, "chunk_size": 24, "local_size": 8}
    with pytest.raises(error, match=message):
        dual_chunk_attn_with_kvcache(**arguments | changes)
    assert torch.equal(inputs.k_cache.nan_to_num(7.0), before)
