"""Tests the Hopper kernels of differential attention in the emulator: float64, dropout, isolation.

test_hopper_gpu.py has the same tests on the hardware.
"""

import dataclasses

import pytest
import torch

from lctrain.kernels import diff_attn_varlen_func
from lctrain_kernels.differential import hopper as differential
from lctrain_kernels.differential.hopper_support import override_backward
from tests.kernels.differential.oracle import (
    DifferentialCase,
    DifferentialInputs,
    assert_matches_oracle,
    attention,
    dense,
    make_inputs,
)
from tests.kernels.gluon_emulator import emulate
from tests.kernels.oracle import DROPOUT_SEED, equal_lengths
from tests.numerics import assert_error_at_most_twice, near_roundings

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_hopper_gpu.py has a GPU"),
]

FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16
LENGTHS = equal_lengths(150, 0, 1, 70)
UNEQUAL = ((70, 300), (130, 40), (1, 129), (65, 0), (0, 63))
V1 = DifferentialCase(LENGTHS, 2, 2, 64, 128, lam="scalar", dtype=BFLOAT16, views="halves")
V2 = DifferentialCase(LENGTHS, 4, 2, 128, 128, shared_k=True, dtype=BFLOAT16, views="adjacent")
CASES = {
    "v1": V1,
    "v1-unequal-float16": dataclasses.replace(V1, documents=UNEQUAL, lam="heads", dtype=FLOAT16),
    "v1-window-gqa": dataclasses.replace(
        V1, documents=UNEQUAL, heads=4, causal=False, window=(40, 20), lam="tokens"
    ),
    "v1-full": dataclasses.replace(V1, causal=False, dout_order="htd"),
    "v1-large_logits": dataclasses.replace(V1, magnitude=30.0),
    "v2": V2,
    "v2-unequal-mqa": dataclasses.replace(V2, documents=UNEQUAL, heads_k=1, dtype=FLOAT16),
    "v2-g1": dataclasses.replace(V2, documents=UNEQUAL, heads=2),
    "v2-window_on_device": dataclasses.replace(
        V2, causal=False, window=(66, 12), window_on_device=True, dout_order="tdh"
    ),
    "D64-one_k": dataclasses.replace(V2, head_dim=64, lam="heads"),
    "D64v64-g3": dataclasses.replace(V1, head_dim=64, value_dim=64, heads=3, heads_k=1),
    "D32v64-one_k": dataclasses.replace(V2, head_dim=32, value_dim=64),
    "D40v40": dataclasses.replace(V1, head_dim=40, value_dim=40),
    "D96v96-one_k": dataclasses.replace(V2, head_dim=96, value_dim=96),
}
FORWARD_CASES = {
    "v1-dropout": dataclasses.replace(V1, dropout_p=0.2, lam="tokens"),
    "v2-dropout-unequal": dataclasses.replace(V2, documents=UNEQUAL, dropout_p=0.3, dtype=FLOAT16),
    "D32v32-dropout-window": dataclasses.replace(
        V1, head_dim=32, value_dim=32, dropout_p=0.1, causal=False, window=(50, -1)
    ),
    "D128-two_k": dataclasses.replace(V2, shared_k=False),
}


@pytest.fixture
def hopper(monkeypatch):
    """Makes backend="hopper" run on this CPU."""
    emulate(monkeypatch, differential)


def forward(case: DifferentialCase, inputs: DifferentialInputs, backend: str = "hopper"):
    """Returns out, lse1 and lse2."""
    with torch.no_grad():
        return diff_attn_varlen_func(
            inputs.q1,
            inputs.q2,
            inputs.k1,
            inputs.k2,
            inputs.v,
            inputs.lam,
            inputs.cu_seqlens_q,
            300,
            dropout_p=case.dropout_p,
            causal=case.causal,
            window_size=case.window,
            return_lse=True,
            dropout_seed=DROPOUT_SEED,
            cu_seqlens_k=inputs.cu_seqlens_k,
            max_seqlen_k=300,
            backend=backend,
        )


@pytest.fixture(params=[False, True], ids=["dq_warp", "registers"])
def form(request):
    """Sets how the backward adds dq."""
    with override_backward(request.param):
        yield request.param


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_float64(case, form, hopper):
    inputs = make_inputs(case)
    assert_matches_oracle(attention(case, inputs, backend="hopper"), case, inputs)


@pytest.mark.parametrize("case", FORWARD_CASES.values(), ids=FORWARD_CASES.keys())
def test_forward_matches_float64(case, hopper):
    """Forward-only cases; their backward runs on the portable kernels."""
    inputs = make_inputs(case)
    exact, plain = (dense(case, inputs, dtype) for dtype in (torch.float64, case.dtype))
    for name, tensor in zip(("out", "lse1", "lse2"), forward(case, inputs), strict=True):
        assert_error_at_most_twice(tensor, getattr(plain, name), getattr(exact, name), name)


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("case", [V1, V2], ids=["v1", "v2"])
def test_whatever_the_order_of_warps_and_engines(case, seed, form, monkeypatch):
    """Products and copies complete as early or as late as their waits allow."""
    emulate(monkeypatch, differential, seed)
    case = dataclasses.replace(case, documents=equal_lengths(150, 70), heads=2, heads_k=1)
    inputs = make_inputs(case)
    assert_matches_oracle(attention(case, inputs, backend="hopper"), case, inputs)


@pytest.mark.parametrize("size", [0.0, -1e-30, 1e-9, -300.0])
def test_lam_of_any_size(size, hopper):
    """The backward computes lam * p2 as a sign and one exponential, which includes log |lam|."""
    case = dataclasses.replace(V1, documents=equal_lengths(140), heads=1, heads_k=1, lam="tokens")
    inputs = make_inputs(case)
    inputs.lam[::2] = size
    assert_matches_oracle(attention(case, inputs, backend="hopper"), case, inputs)


@pytest.mark.parametrize("case", [V1, V2], ids=["v1", "v2"])
def test_both_ways_to_add_dq_give_the_other_gradients_the_same_bits(case, hopper):
    case = dataclasses.replace(case, documents=UNEQUAL)
    inputs = make_inputs(case)
    found = []
    for from_registers in (False, True):
        with override_backward(from_registers):
            found.append(dict(attention(case, inputs, backend="hopper").items()))
    for part in found[0].keys() - {"dq1", "dq2"}:
        assert torch.equal(found[0][part], found[1][part]), part


@pytest.mark.parametrize("case", [V1, V2], ids=["v1", "v2"])
def test_a_document_keeps_its_bits_whatever_its_neighbours(case, form, hopper):
    """dq1 and dq2 are not compared, because programs add them in varying order."""
    documents = equal_lengths(100, 140, 30)
    case = dataclasses.replace(case, documents=documents, heads=2, heads_k=1, lam="tokens")
    inputs = make_inputs(case)
    before = attention(case, inputs, backend="hopper").document(inputs, 1)
    for tensor in (inputs.q1, inputs.q2, inputs.k1, inputs.k2, inputs.v, inputs.lam):
        tensor[:100] = torch.nan
        tensor[240:] = torch.inf
    after = dict(attention(case, inputs, backend="hopper").document(inputs, 1).items())
    for part, tensor in before.items():
        if part in ("dq1", "dq2"):
            assert after[part].isfinite().all(), part
        else:
            assert torch.equal(tensor, after[part]), part


def test_drops_the_weights_that_pytorch_drops(hopper):
    """With uniform weights and one-hot values, out shows the masks of both branches."""
    case = DifferentialCase(
        ((77, 64),), 4, 1, 64, 64, lam="scalar", dtype=FLOAT16, causal=False, dropout_p=0.3
    )
    inputs = make_inputs(case)
    for tensor in (inputs.q1, inputs.q2):
        tensor.zero_()
    inputs.v.copy_(torch.eye(64)[:, None])
    inputs.lam.fill_(0.5)
    out, _, _ = forward(case, inputs)
    expected, _, _ = forward(case, inputs, "pytorch")
    assert len(out.unique()) == 4  # of none, of one, of the other, of both
    # Weights are 2^0 before they are divided by their sum: each result is rounded once.
    assert out.double().numpy() == near_roundings(expected.double().numpy(), 2, FLOAT16)


def test_an_empty_pack(hopper):
    case = dataclasses.replace(V1, documents=((0, 5),))
    result = attention(case, make_inputs(case), backend="hopper")
    assert not result.dk1.any()
    assert not result.dv.any()
