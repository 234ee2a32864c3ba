"""Compares varlen attention on a GPU with float64, on the broad list of cases."""

import dataclasses

import pytest
import torch

from lctrain.kernels import select_backend
from tests.kernels.cases import GPU_CASES, GPU_PLAIN
from tests.kernels.oracle import (
    assert_matches_oracle,
    attention,
    equal_lengths,
    make_inputs,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_filled_memory")]


@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES.keys())
def test_matches_float64(case, device):
    """float32 runs the PyTorch path, since a float32 lse is too coarse for its gradients."""
    inputs = make_inputs(case, device)
    backend = "auto" if case.dtype == torch.float32 else "triton"
    assert (select_backend(device, case.dtype) == "pytorch") == (backend == "auto")
    assert_matches_oracle(attention(case, inputs, backend=backend), case, inputs)


@pytest.mark.parametrize("name", ["D64-causal-unequal", "D128-everything-g8"])
def test_the_pytorch_path_on_a_gpu(name, device):
    """backend="pytorch" selects the PyTorch path; "auto" would take Triton."""
    case = GPU_CASES[name]
    inputs = make_inputs(case, device)
    assert_matches_oracle(attention(case, inputs, backend="pytorch"), case, inputs)


def test_large_logits_are_large(device):
    inputs = make_inputs(GPU_CASES["D64-causal-large_logits"], device)
    logits = inputs.q[:300, 0].float() @ inputs.k[:300, 0].float().T / 8
    assert 5e3 < logits.abs().max() < 2e4


def test_auto_is_the_backend_that_it_names(device):
    """Bits are equal; those of dq only if programs add it in a fixed order."""
    inputs = make_inputs(GPU_PLAIN, device)
    backend = select_backend(device, torch.bfloat16)
    named = dict(attention(GPU_PLAIN, inputs, backend=backend).items())
    auto = dict(attention(GPU_PLAIN, inputs, backend="auto").items())
    for name, tensor in named.items():
        if backend == "triton" or name != "dq":
            assert torch.equal(tensor, auto[name]), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["plain", "dropout"])
def test_two_thousand_documents(device, dropout_p):
    lengths = [(37 * index) % 90 for index in range(2000)]
    case = dataclasses.replace(GPU_PLAIN, documents=equal_lengths(*lengths), dropout_p=dropout_p)
    inputs = make_inputs(case, device)
    result = attention(case, inputs, backend="triton")
    for name, tensor in result.items():
        assert tensor.isfinite().all(), name
    assert_matches_oracle(result, case, inputs, sample=[*range(0, 2000, 61), 1999])


@pytest.mark.xdist_group("gpu_memory")
def test_a_hundred_thousand_tokens_beside_a_hundred_documents_of_twenty(device):
    lengths = [20] * 50 + [100_000] + [20] * 50
    case = dataclasses.replace(GPU_PLAIN, heads=2, heads_k=1, documents=equal_lengths(*lengths))
    inputs = make_inputs(case, device)
    result = attention(case, inputs, backend="triton")
    assert_matches_oracle(result, case, inputs, chunk=1024, sample=[0, 49, 50, 51, 100])
    short = [index for index, length in enumerate(lengths) if length == 20]
    assert_matches_oracle(result, case, inputs, sample=short)


def test_a_window_in_a_long_document(device):
    """The window begins and ends far from the ends of the document."""
    case = dataclasses.replace(
        GPU_PLAIN, documents=((20_000, 20_000), (5_000, 20_000)), window=(50, -1)
    )
    inputs = make_inputs(case, device)
    assert_matches_oracle(attention(case, inputs, backend="triton"), case, inputs, chunk=512)
