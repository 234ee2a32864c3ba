"""Tests scalars of compiled calls: Inductor makes a float that varies a float64 argument."""

import pytest
import torch

from lctrain.kernels import flash_attn_varlen_func, linear_cross_entropy, rms_norm
from tests.kernels.oracle import cumulative


def norm(x, number):
    return rms_norm(x, torch.ones(16, device=x.device, dtype=x.dtype), number)


def attention(x, number):
    q = x.view(len(x), 1, 16)
    cu = cumulative([len(x)], x.device)
    return flash_attn_varlen_func(q, q, q, cu, cu, len(x), len(x), softmax_scale=number)


def loss(x, number):
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    return linear_cross_entropy(x, x[:8], labels, logit_scale=number)[0]


@pytest.mark.parametrize("function", [norm, attention, loss])
@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)],
)
def test_a_float_that_varies_gives_what_the_eager_call_gives(function, device, backend):
    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=True, backend=backend)
    x = torch.randn(24, 16, device=device, dtype=torch.bfloat16)
    for number in (0.5, 0.25, 0.125):
        expected, found = function(x, number), compiled(x, number)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
