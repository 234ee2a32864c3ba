"""Tests the published dual chunk attention: the output of one softmax, but other gradients."""

import dataclasses

import pytest
import torch

from lctrain_kernels.bench.published_dual_chunk import published_dual_chunk_attn
from tests.kernels.oracle import Case, dense, equal_lengths, frequencies, make_inputs
from tests.numerics import assert_equal_in_float64

# A document of one chunk, of two, and of many.
CASE = Case(equal_lengths(20, 35, 97), dtype=torch.float64, chunks=(30, 7), heads_k=2)


def published(case, inputs, **options):
    """Returns (out, dq, dk, dv)."""
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = published_dual_chunk_attn(
        *leaves,
        inputs.cu_seqlens_q,
        97,
        inv_freq=frequencies(case, "cpu"),
        chunk_size=case.chunks[0],
        local_size=case.chunks[1],
        **options,
    )
    return out.detach(), *torch.autograd.grad(out, leaves, inputs.dout)


@pytest.mark.parametrize("call_per_chunk", [False, True], ids=["packed", "per_chunk"])
def test_output_and_dv_are_exact_and_the_other_gradients_are_not(call_per_chunk):
    inputs = dataclasses.replace(make_inputs(CASE))
    inputs.dlse.zero_()  # the published code has no gradient of lse
    exact = dense(CASE, inputs, torch.float64)
    out, dq, dk, dv = published(CASE, inputs, call_per_chunk=call_per_chunk)
    assert_equal_in_float64(out, exact.out)
    assert_equal_in_float64(dv, exact.dv)
    assert (dq - exact.dq).norm() > 0.02 * exact.dq.norm()
    assert (dk - exact.dk).norm() > 0.02 * exact.dk.norm()
    one_chunk = slice(0, 20)
    assert_equal_in_float64(dq[one_chunk], exact.dq[one_chunk])


@pytest.mark.parametrize("documents", [(), (0,), (0, 0)], ids=["none", "one", "two"])
@pytest.mark.parametrize("call_per_chunk", [False, True], ids=["packed", "per_chunk"])
def test_packs_without_tokens(call_per_chunk, documents):
    case = dataclasses.replace(CASE, documents=equal_lengths(*documents))
    inputs = make_inputs(case)
    expected = inputs.q, inputs.q, inputs.k, inputs.v
    for tensor, like in zip(
        published(case, inputs, call_per_chunk=call_per_chunk), expected, strict=True
    ):
        assert tensor.shape == like.shape


def test_both_ways_to_call_give_the_same():
    inputs = make_inputs(CASE)
    for packed, per_chunk in zip(
        published(CASE, inputs), published(CASE, inputs, call_per_chunk=True), strict=True
    ):
        assert_equal_in_float64(packed, per_chunk)
