"""Compares dual chunk attention on a GPU with float64, on the broad list of cases."""

import dataclasses

import pytest
import torch

from tests.kernels.cases import GPU_DUAL_CHUNK_CASES, GPU_DUAL_CHUNK_PLAIN
from tests.kernels.oracle import (
    assert_matches_oracle,
    attention,
    dense,
    equal_lengths,
    make_inputs,
)
from tests.numerics import assert_error_at_most_twice

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_filled_memory")]


@pytest.mark.parametrize("case", GPU_DUAL_CHUNK_CASES.values(), ids=GPU_DUAL_CHUNK_CASES.keys())
def test_matches_float64(case, device):
    inputs = make_inputs(case, device)
    backend = "auto" if case.dtype == torch.float32 else "triton"
    assert_matches_oracle(attention(case, inputs, backend=backend), case, inputs)


def test_the_pytorch_path_on_a_gpu(device):
    case = GPU_DUAL_CHUNK_PLAIN
    inputs = make_inputs(case, device)
    assert_matches_oracle(attention(case, inputs, backend="pytorch"), case, inputs)


def test_five_hundred_documents(device):
    lengths = [(37 * index) % 290 for index in range(500)]
    case = dataclasses.replace(
        GPU_DUAL_CHUNK_PLAIN, documents=equal_lengths(*lengths), chunks=(100, 13), dropout_p=0.1
    )
    inputs = make_inputs(case, device)
    result = attention(case, inputs)
    for name, tensor in result.items():
        assert tensor.isfinite().all() or name == "lse", name
    assert_matches_oracle(result, case, inputs, sample=[*range(0, 500, 31), 499])


def test_a_hundred_thousand_tokens_beside_a_hundred_documents_of_twenty(device):
    lengths = [20] * 50 + [100_000] + [20] * 50
    case = dataclasses.replace(
        GPU_DUAL_CHUNK_PLAIN,
        heads=2,
        heads_k=1,
        documents=equal_lengths(*lengths),
        chunks=(4095, 512),
    )
    inputs = make_inputs(case, device)
    result = attention(case, inputs)
    short = [index for index, length in enumerate(lengths) if length == 20]
    assert_matches_oracle(result, case, inputs, sample=short)
    plain, exact = (
        dense(case, inputs, dtype, chunk=512, sample=[50])
        for dtype in (inputs.q.dtype, torch.float64)
    )
    for begin in range(1000, 101_000, 10_000):  # gradients of late keys are small beside others
        part = slice(begin, begin + 10_000)
        for name in ("out", "dq", "dk", "dv"):
            tensors = (getattr(values, name)[part] for values in (result, plain, exact))
            assert_error_at_most_twice(*tensors, f"{name} of the 10,000 tokens from {begin} on")
