"""Tests the most probable token of each row of logits, and its log-probability."""

import pytest
import torch

from lctrain_kernels.sampling.api import most_probable
from tests.kernels.fused_cases import all_backends
from tests.numerics import assert_error_at_most_twice

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("words", [1, 7, 4096, 9001])
@all_backends
def test_it_is_the_argmax_and_its_log_softmax(device, dtype, backend, words):
    logits = (4 * torch.randn(5, words, device=device)).to(dtype)
    tokens, log_probs = most_probable(logits, backend=backend)
    assert torch.equal(tokens, logits.float().argmax(-1))
    assert (tokens.dtype, log_probs.dtype) == (torch.int64, torch.float32)
    plain, exact = (
        torch.log_softmax(logits.to(kind), -1).gather(-1, tokens[:, None])[:, 0]
        for kind in (torch.float32, torch.float64)
    )
    if words == 1:
        assert log_probs.tolist() == [0.0] * 5
    else:
        assert_error_at_most_twice(log_probs, plain, exact)


@all_backends
def test_the_first_of_equal_logits_is_taken(device, dtype, backend):
    logits = torch.zeros(3, 5000, device=device, dtype=dtype)
    logits[1, 4500:] = logits[1, 137] = 2.0
    logits[2, 4999] = 1.0
    assert most_probable(logits, backend=backend)[0].tolist() == [0, 137, 4999]


@all_backends
def test_rows_without_a_distribution_give_nan(device, dtype, backend):
    logits = torch.zeros(6, 5000, device=device, dtype=dtype)
    logits[0, 4321] = NAN
    logits[1, 17] = INF
    logits[2] = -INF
    logits[3] = NAN
    logits[4, 1:] = -INF
    tokens, log_probs = most_probable(logits, backend=backend)
    assert log_probs.isnan().tolist() == [True] * 4 + [False] * 2
    assert log_probs[4].item() == 0.0
    assert set(tokens.tolist()) <= set(range(5000))


@all_backends
def test_rows_and_columns_may_have_any_stride(device, dtype, backend):
    logits = torch.randn(6, 50, device=device).to(dtype)
    expected = most_probable(logits, backend=backend)
    wide = torch.zeros(6, 70, device=device, dtype=dtype)
    wide[:, :50] = logits
    for other in (wide[:, :50], logits.t().contiguous().t()):
        found = most_probable(other, backend=backend)
        assert all(map(torch.equal, found, expected))
    assert [len(one) for one in most_probable(logits[:0], backend=backend)] == [0, 0]


def test_float64_stays_float64():
    logits = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert most_probable(logits)[1].dtype == torch.float64


@pytest.mark.parametrize(
    "logits", [torch.zeros(3), torch.zeros(2, 0), torch.zeros(2, 3, dtype=torch.int64)]
)
def test_wrong_logits(logits):
    with pytest.raises(ValueError, match=r"logits must be floating point \[B, V\], got"):
        most_probable(logits)
