"""Tests the Hopper kernels of differential attention on a GPU: float64, dropout, isolation."""

import dataclasses

import pytest
import torch

from lctrain.kernels import diff_attn_varlen_func, make_schedule
from lctrain_kernels.differential import hopper as differential
from lctrain_kernels.differential.hopper_support import override_backward
from tests.kernels.differential.cases import GPU_CASES, V1, V2
from tests.kernels.differential.oracle import assert_matches_oracle, attention, dense, make_inputs
from tests.kernels.differential.test_differential_gpu import leaves_of
from tests.kernels.oracle import DROPOUT_SEED, cumulative, equal_lengths
from tests.numerics import assert_error_at_most_twice

pytestmark = [pytest.mark.gpu, pytest.mark.hopper, pytest.mark.usefixtures("nan_filled_memory")]

SERVED = (
    "v1",
    "v1-unequal",
    "v1-large_logits",
    "v1-window_left-gqa",
    "v1-tokens-full",
    "v2",
    "v2-unequal-mqa",
    "v2-window_on_device",
    "v2-float16",
    "D32v32",
    "D32v64-shared",
    "D64v64-g8",
    "D20v40",
)
REFUSED = {
    "v1-dropout": "backward of dropout",
    "v2-dropout": "backward of dropout",
    "D96v96": "a k per branch",
    "D96v192": "above 128",
    "D128v256": "above 128",
}
LONG = equal_lengths(1000, 0, 517, 1, 300, 129, 2100)
LONG_CASES = {
    "v1": dataclasses.replace(V1, documents=LONG),
    "v1-tokens-g4": dataclasses.replace(V1, documents=LONG, heads_k=1, lam="tokens"),
    "v1-window": dataclasses.replace(V1, documents=LONG, window=(200, -1)),
    "v1-full": dataclasses.replace(V1, documents=LONG, causal=False),
    "v2": dataclasses.replace(V2, documents=LONG),
    "v2-g1": dataclasses.replace(V2, documents=LONG, heads=2),
    "v2-large_logits": dataclasses.replace(V2, documents=LONG, heads=8, magnitude=30.0),
    "D64v64": dataclasses.replace(V1, documents=LONG, value_dim=64),
}
by_version = pytest.mark.parametrize("case", [LONG_CASES["v1"], LONG_CASES["v2"]], ids=["v1", "v2"])


@pytest.mark.parametrize("name", SERVED)
def test_matches_float64(name, device):
    case = GPU_CASES[name]
    inputs = make_inputs(case, device)
    assert_matches_oracle(attention(case, inputs, backend="hopper"), case, inputs)


@pytest.mark.parametrize("case", LONG_CASES.values(), ids=LONG_CASES.keys())
def test_documents_of_many_tiles(case, device):
    inputs = make_inputs(case, device)
    assert_matches_oracle(attention(case, inputs, backend="hopper"), case, inputs)


@pytest.mark.parametrize("name", ["v1-tokens-g4", "v1-window", "v2", "D64v64"])
def test_both_ways_to_add_dq(name, device):
    """Compares both with float64, and with each other bit by bit in all but dq."""
    case = LONG_CASES[name]
    inputs = make_inputs(case, device)
    results = []
    for from_registers in (False, True):
        with override_backward(from_registers):
            results.append(attention(case, inputs, backend="hopper"))
        assert_matches_oracle(results[-1], case, inputs)
    before, after = (dict(result.items()) for result in results)
    for part in before.keys() - {"dq1", "dq2"}:
        assert torch.equal(before[part], after[part]), part


@pytest.mark.parametrize(("name", "reason"), REFUSED.items(), ids=REFUSED.keys())
def test_refuses_what_it_cannot_do(name, reason, device):
    case = GPU_CASES[name]
    with pytest.raises(ValueError, match=reason):
        attention(case, make_inputs(case, device), backend="hopper")


@pytest.mark.parametrize("name", ["v1-dropout", "v2-dropout", "D96v96", "D128v128"])
def test_forward_agrees_with_the_portable_kernels(name, device):
    """Cases without a Hopper backward; with dropout both backends drop the same weights."""
    case = GPU_CASES[name]
    inputs = make_inputs(case, device)
    results = {}
    for backend in ("hopper", "triton"):
        with torch.no_grad():
            results[backend] = diff_attn_varlen_func(
                inputs.q1,
                inputs.q2,
                inputs.k1,
                inputs.k2,
                inputs.v,
                inputs.lam,
                inputs.cu_seqlens_q,
                300,
                dropout_p=case.dropout_p,
                return_lse=True,
                dropout_seed=DROPOUT_SEED,
                backend=backend,
            )
    exact = dense(case, inputs, torch.float64)
    for name, actual, expected in zip(
        ("out", "lse1", "lse2"), results["hopper"], results["triton"], strict=True
    ):
        assert_error_at_most_twice(actual, expected, getattr(exact, name), name)


@by_version
def test_a_document_keeps_its_bits_whatever_its_neighbours(case, device):
    """dq1 and dq2 are not compared, because programs add them in varying order."""
    inputs = make_inputs(case, device)
    before = attention(case, inputs, backend="hopper").document(inputs, 2)
    begin = sum(length for length, _ in LONG[:2])
    end = begin + LONG[2][0]
    for tensor in (inputs.q1, inputs.q2, inputs.k1, inputs.k2, inputs.v):
        tensor[:begin] = torch.nan
        tensor[end:] = torch.inf
    after = dict(attention(case, inputs, backend="hopper").document(inputs, 2).items())
    for part, tensor in before.items():
        if part in ("dq1", "dq2"):
            assert after[part].isfinite().all(), part
        else:
            assert torch.equal(tensor, after[part]), part


def compiled_kernels() -> int:
    """Returns the number of specialisations in the caches of these kernels."""
    kernels = [kernel for name, kernel in vars(differential).items() if name.endswith("_kernel")]
    return sum(len(caches[0]) for k in kernels for caches in k.device_caches.values())


@by_version
def test_no_synchronisation_and_no_recompilation(case, device, no_synchronisation):
    def step(lengths):
        cu = cumulative(lengths, "cpu").pin_memory().to(device, non_blocking=True)
        schedule = make_schedule(lengths).pin_memory().to(device, non_blocking=True)
        leaves = leaves_of(case, sum(lengths), device)
        out = diff_attn_varlen_func(*leaves, cu, max(lengths), schedule=schedule, backend="hopper")
        torch.autograd.backward(out, torch.ones_like(out))

    for lengths in ([70, 3, 200], [64, 64], [1]):  # compiles
        step(lengths)
    compiled = compiled_kernels()
    with no_synchronisation():
        for lengths in ([70, 3, 200], [5, 0, 129, 64], [33], [128] * 7):
            step(lengths)
    assert compiled_kernels() == compiled


@by_version
def test_two_thousand_documents(case, device):
    lengths = [(37 * index) % 90 for index in range(2000)]
    case = dataclasses.replace(case, documents=equal_lengths(*lengths))
    inputs = make_inputs(case, device)
    assert torch.equal(inputs.cu_seqlens_q, cumulative(lengths, device))
    result = attention(case, inputs, backend="hopper")
    assert_matches_oracle(result, case, inputs, sample=[*range(0, 2000, 61), 1999])
