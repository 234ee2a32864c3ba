"""Tests the Hopper kernels of dual chunk attention on a Hopper GPU: float64, dropout, isolation."""

import dataclasses

import pytest
import torch

from lctrain.kernels import dual_chunk_attn_varlen_func
from lctrain_kernels.dual_chunk.hopper_support import BackwardForm, override_backward
from lctrain_kernels.gluon.config import BackwardTile
from tests.kernels.cases import GPU_DUAL_CHUNK_CASES
from tests.kernels.oracle import (
    DROPOUT_SEED,
    Case,
    assert_matches_oracle,
    attention,
    dense,
    equal_lengths,
    frequencies,
    make_inputs,
)
from tests.numerics import assert_error_at_most_twice

pytestmark = [pytest.mark.gpu, pytest.mark.hopper, pytest.mark.usefixtures("nan_filled_memory")]

LONG = equal_lengths(1000, 0, 517, 1, 300, 129, 2100)
CASES = {
    name: case
    for name, case in GPU_DUAL_CHUNK_CASES.items()
    if case.dtype != torch.float32 and case.head_dim in (64, 96, 128) and case.dropout_p == 0
}
CASES["D128-many_tiles"] = Case(
    LONG, 8, 2, 128, torch.bfloat16, chunks=(500, 120), logit_scale=True
)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_dual_chunk_attention_matches_float64(case, device):
    inputs = make_inputs(case, device)
    assert_matches_oracle(attention(case, inputs, backend="hopper"), case, inputs)


@pytest.mark.parametrize("chunks", [(500, 120), (489, 122)], ids=str)
def test_other_forms_of_the_backward(chunks, device):
    """Compares both ways to add dq with float64, and with each other bit by bit in dk and dv."""
    case = dataclasses.replace(CASES["D128-many_tiles"], chunks=chunks)
    inputs = make_inputs(case, device)
    results = []
    for tile in (BackwardTile(64, 2), BackwardTile(64, 3, reduce_from_registers=True)):
        with override_backward(BackwardForm(tile, full_weights=True)):
            results.append(attention(case, inputs, backend="hopper"))
        assert_matches_oracle(results[-1], case, inputs)
    assert torch.equal(results[0].dk, results[1].dk)
    assert torch.equal(results[0].dv, results[1].dv)


@pytest.mark.parametrize("name", ["D64-dropout-scale-fused_qkv", "D128-dropout-g4-float16"])
def test_dropout_of_dual_chunk_attention(name, device):
    """Tests the forward only; with dropout the backward runs on the portable kernels."""
    case = GPU_DUAL_CHUNK_CASES[name]
    inputs = make_inputs(case, device)
    with torch.no_grad():
        out, lse = dual_chunk_attn_varlen_func(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.cu_seqlens_q,
            1000,
            inv_freq=frequencies(case, device),
            chunk_size=case.chunks[0],
            local_size=case.chunks[1],
            logit_scale=inputs.logit_scale,
            dropout_p=case.dropout_p,
            dropout_seed=DROPOUT_SEED,
            return_lse=True,
            backend="hopper",
        )
    exact, plain = (dense(case, inputs, dtype) for dtype in (torch.float64, case.dtype))
    assert_error_at_most_twice(out, plain.out, exact.out, "out")
    assert_error_at_most_twice(lse, plain.lse, exact.lse, "lse")


def test_a_document_of_dual_chunk_attention_keeps_its_bits(device):
    """Compares out, lse, dk and dv between neighbours that hold NaN or infinity."""
    case = CASES["D128-many_tiles"]
    inputs = make_inputs(case, device)
    before = dict(attention(case, inputs, backend="hopper").items())
    begin = sum(length for length, _ in LONG[:2])
    end = begin + LONG[2][0]
    for tensor in (inputs.q, inputs.k, inputs.v):
        tensor[:begin] = torch.nan
        tensor[end:] = torch.inf
    after = dict(attention(case, inputs, backend="hopper").items())
    assert torch.equal(before["lse"][:, begin:end], after["lse"][:, begin:end])
    for part in ("out", "dk", "dv"):
        assert torch.equal(before[part][begin:end], after[part][begin:end]), part
    assert after["dq"][begin:end].isfinite().all()
