"""Helpers for the tests of fused operations: the list of backends, and the error bound."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_error_at_most_twice

# Triton's interpreter cuts instead of rounding to bfloat16.
CASES = [
    pytest.param("cpu", torch.float32, "pytorch", id="float32"),
    pytest.param("cpu", torch.bfloat16, "pytorch", id="bfloat16"),
    pytest.param("cpu", torch.float32, "triton", id="triton-float32"),
    pytest.param("cpu", torch.float16, "triton", id="triton-float16"),
    pytest.param("cuda", torch.float32, "triton", id="gpu-float32", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, "triton", id="gpu-bfloat16", marks=pytest.mark.gpu),
]
all_backends = pytest.mark.parametrize(("device", "dtype", "backend"), CASES)


def assert_error_at_most_twice_plain(
    ours: Callable, plain: Callable, tensors: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Asserts that an operation's error against float64 is at most twice that of plain PyTorch.

    The results and the gradients of all tensors are compared.

    Args:
        ours: Function under test.
        plain: The same function in plain PyTorch.
        tensors: Arguments of both functions.
        dtype: Dtype of both runs. The float64 reference gets the same values.
    """

    def results(function: Callable, precision: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).to(precision).requires_grad_() for t in tensors]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(o.shape, generator=generator).to(dtype) for o in outputs]
        upstream = [g.to(o.device, precision) for g, o in zip(upstream, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, inputs, upstream)
        return [*outputs, *grads]

    actual, other = results(ours, dtype), results(plain, dtype)
    exact = results(plain, torch.float64)
    for number, values in enumerate(zip(actual, other, exact, strict=True)):
        assert_error_at_most_twice(*values, f"result {number}")
