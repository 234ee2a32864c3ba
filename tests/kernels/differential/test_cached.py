"""Compares differential attention over a cache with float64."""

from dataclasses import replace

import pytest
import torch

from lctrain.kernels import diff_attn_varlen_func, diff_attn_with_kvcache
from tests.kernels.decode.kvcache import KVCase, make_kv
from tests.kernels.decode.sharing import plan_of, share, shared_of
from tests.kernels.oracle import cumulative
from tests.numerics import assert_error_at_most_twice

HALF = torch.float16
ONE = KVCase(lengths=(77, 0), capacity=96, new=1, heads=8, heads_k=2, head_dim=16, causal=True)
CASES = {
    "one_query": ONE,
    "page16-window": replace(ONE, page=16, window=(60, 0)),
    "few_queries": replace(ONE, seqlen_q=3, new=3, heads=12, leftpad=True, batch_index=True),
    "page32-not_causal": replace(ONE, page=32, causal=False, heads=4),
}


def call(inputs, lam, halves, backend, plan=None):
    places = ("cache_seqlens", "cache_leftpad", "cache_batch_idx", "block_table", "causal")
    options = {name: inputs.options[name] for name in places if name in inputs.options}
    return diff_attn_with_kvcache(
        *(inputs.q, inputs.k_cache, inputs.v_cache, lam, inputs.k, inputs.v),
        window_size=inputs.options["window_size"],
        halves=halves,
        plan=plan,
        backend=backend,
        **options,
    )


def plain(case, inputs, lam, halves, dtype):
    """Returns diff_attn_varlen_func of each request, in plain PyTorch in `dtype`."""
    outs = []
    for request, stored in enumerate(case.lengths):
        pad = stored // 3 if case.leftpad else 0
        k, v = (
            torch.cat((side[request, pad:stored], new[request])).to(dtype)
            for side, new in ((inputs.keys, inputs.k), (inputs.values, inputs.v))
        )
        q = inputs.q[request].to(dtype)
        if halves:
            operands = (*q.chunk(2, 1), *k.chunk(2, 1), torch.cat(v.chunk(2, 1), -1))
        else:
            operands = (q[:, 0::2], q[:, 1::2], k, k, v)
        cu = [cumulative([n], q.device) for n in (len(q), len(k))]
        outs.append(
            diff_attn_varlen_func(
                *operands,
                lam[request] if lam.dim() == 3 else lam,
                *(cu[0], len(q)),
                causal=case.causal,
                window_size=case.window,
                backend="pytorch",
                cu_seqlens_k=cu[1],
                max_seqlen_k=len(k),
            )
        )
    return torch.stack(outs)


@pytest.mark.parametrize("backend", ["triton", "pytorch"])
@pytest.mark.parametrize("halves", [True, False], ids=["version1", "version2"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_float64(case, halves, backend, device, nan_filled_memory):
    inputs = make_kv(case, device)
    lam = torch.rand(len(case.lengths), case.seqlen_q, case.heads // 2, device=device)
    if case.page:
        lam = lam[0, 0] if case.causal else lam[0, 0, 0]
    out = call(inputs, lam, halves, backend)
    exact, same = (plain(case, inputs, lam, halves, dtype) for dtype in (torch.float64, HALF))
    assert out.shape == exact.shape
    assert_error_at_most_twice(out, same, exact, "out")


SHARED = replace(ONE, lengths=(150, 135, 20, 129), capacity=160, page=16)


@pytest.mark.parametrize("halves", [True, False], ids=["version1", "version2"])
def test_a_shared_prefix_matches_float64(halves, device, nan_filled_memory):
    inputs = make_kv(SHARED, device)
    share(inputs, SHARED, (0, 1, 3), 128)
    lam = torch.rand(SHARED.heads // 2, device=device)
    out = call(inputs, lam, halves, "triton", plan_of(inputs, SHARED, shared_of(inputs, SHARED)))
    exact, same = (plain(SHARED, inputs, lam, halves, dtype) for dtype in (torch.float64, HALF))
    assert_error_at_most_twice(out, same, exact, "out")
    apart = call(inputs, lam, halves, "triton")
    assert torch.equal(out[2], apart[2])


def test_a_plan_without_prefixes_changes_no_bit(device):
    inputs = make_kv(SHARED, device)
    lam = torch.rand(SHARED.heads // 2, device=device)
    found = call(inputs, lam, True, "triton", plan_of(inputs, SHARED))
    assert torch.equal(found, call(inputs, lam, True, "triton"))


def test_a_request_reaches_no_sibling_of_its_group(device):
    """A request's suffix and queries are NaN: the others of its group keep their bits."""
    clean, inputs = make_kv(SHARED, device), make_kv(SHARED, device)
    for one in (clean, inputs):
        share(one, SHARED, (0, 1, 3), 128)
    lam = torch.rand(SHARED.heads // 2, device=device)
    plan = plan_of(clean, SHARED, shared_of(clean, SHARED))
    expected = call(clean, lam, True, "triton", plan)
    for tensor in (inputs.q, inputs.k, inputs.v):
        tensor[1] = float("nan")
    page, slot = inputs.places(1, torch.arange(128, 135, device=device))
    inputs.k_cache[page, slot] = inputs.v_cache[page, slot] = float("nan")
    found = call(inputs, lam, True, "triton", plan)
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])
    assert found[1].isnan().all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 1, 2, 16)}, ValueError, "heads must form pairs that share their"),
        ({"lam": 0.5}, TypeError, "lam must be a floating-point tensor"),
        ({"lam": torch.ones(4, device="meta")}, ValueError, "on q's device, cpu, got meta. Move"),
        ({"lam": torch.ones(3)}, ValueError, r"lam must be a scalar, \[4\] or \[2, 1, 4\], got"),
        ({"plan": "x"}, TypeError, "plan must be a DecodePlan or None, got str. Pass the result"),
        ({"window_size": (1,)}, TypeError, "window_size must be"),
        ({"backend": "hopper"}, ValueError, "backend='hopper', which has no decode kernels"),
        (
            {"lam": torch.ones(4).requires_grad_()},
            ValueError,
            "diff_attn_with_kvcache has no backward, and lam requires a gradient.*"
            "train with diff_attn_varlen_func",
        ),
    ],
)
def test_bad_arguments(changes, error, message):
    inputs = make_kv(ONE, "cpu", torch.float32)
    before = inputs.k_cache.nan_to_num(7.0)
    arguments = {"q": inputs.q, "k_cache": inputs.k_cache, "v_cache": inputs.v_cache}
    arguments |= {"k": inputs.k, "v": inputs.v, "cache_seqlens": 3, "lam": torch.ones(4)}
    with pytest.raises(error, match=message):
        diff_attn_with_kvcache(**arguments | changes)
    assert torch.equal(inputs.k_cache.nan_to_num(7.0), before)
