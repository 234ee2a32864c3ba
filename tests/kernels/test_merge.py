"""Tests merge_attn_states: attention over two sets of keys merges to attention over their union."""

import math

import pytest
import torch

from lctrain.kernels import flash_attn_varlen_func, merge_attn_states
from tests.kernels.oracle import cumulative
from tests.numerics import assert_equal_in_float64, assert_error_at_most_twice, near_roundings


def partial_attention(q, k, v):
    cu_q, cu_k = cumulative([len(q)], q.device), cumulative([len(k)], q.device)
    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, len(q), len(k), return_lse=True)


def random_qkv(dtype, keys=11):
    q = torch.randn(6, 4, 8, dtype=dtype, requires_grad=True)
    k = torch.randn(keys, 2, 8, dtype=dtype, requires_grad=True)
    v = torch.randn(keys, 2, 8, dtype=dtype, requires_grad=True)
    return q, k, v


def merged_attention(q, k, v, split):
    first = partial_attention(q, k[:split], v[:split])
    return merge_attn_states(*first, *partial_attention(q, k[split:], v[split:]))


@pytest.mark.parametrize("split", [0, 4, 11])
def test_a_split_of_the_keys_changes_nothing(split):
    """The gradient of lse is unchanged too; it reaches q and the keys of both parts."""
    q, k, v = random_qkv(torch.float64)
    results = []
    for out, lse in (partial_attention(q, k, v), merged_attention(q, k, v, split)):
        loss = (out * torch.linspace(-1, 1, 8)).sum() + lse.square().sum()
        results.append((out, lse, *torch.autograd.grad(loss, (q, k, v))))
    for whole, merged in zip(*results, strict=True):
        assert_equal_in_float64(merged, whole)


def test_gradcheck_in_all_four():
    out_a, out_b = (torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in "ab")
    lse_a, lse_b = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in "ab")
    assert torch.autograd.gradcheck(merge_attn_states, (out_a, lse_a, out_b, lse_b))


def test_large_lse_neither_overflows_nor_vanishes():
    out_a, out_b = torch.ones(1, 1, 2), torch.zeros(1, 1, 2)
    out, lse = merge_attn_states(out_a, torch.tensor([[9000.0]]), out_b, torch.tensor([[9000.0]]))
    assert torch.equal(out, torch.full((1, 1, 2), 0.5))
    assert lse.item() == near_roundings(9000.0 + math.log(2.0), 2)


@pytest.mark.parametrize("empty", ["a", "b", "both"])
def test_empty_sets_take_no_part(empty):
    out_a, out_b = (torch.randn(2, 1, 4, requires_grad=True) for _ in "ab")
    lse_a = torch.full((1, 2), -torch.inf if empty in ("a", "both") else 0.7, requires_grad=True)
    lse_b = torch.full((1, 2), -torch.inf if empty in ("b", "both") else 0.7, requires_grad=True)
    out, lse = merge_attn_states(out_a, lse_a, out_b, lse_b)
    if empty == "both":
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
    else:
        assert torch.equal(out, out_b if empty == "a" else out_a)
        assert torch.equal(lse, lse_b if empty == "a" else lse_a)
    finite = torch.where(lse.isfinite(), lse, 0.0)
    for grad in torch.autograd.grad(out.sum() + finite.sum(), (out_a, lse_a, out_b, lse_b)):
        assert grad.isfinite().all()


def test_half_precision_outputs_are_merged_in_float32():
    q, k, v = random_qkv(torch.bfloat16)
    out, lse = merged_attention(q, k, v, 5)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), enable_gqa=True
    )
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(0, 1)[None] for x in (q, k, v)), enable_gqa=True
    )
    assert_error_at_most_twice(out, plain[0].transpose(0, 1), exact[0].transpose(0, 1), "out")


def test_shapes_that_do_not_fit_are_refused():
    out, lse = torch.zeros(3, 2, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="outputs of one shape"):
        merge_attn_states(out, lse, out[:2], lse)
    with pytest.raises(ValueError, match=r"lse of shape \[H, T\]"):
        merge_attn_states(out, lse.T, out, lse.T)
