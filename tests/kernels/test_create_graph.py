"""Tests first and second derivatives of operators under create_graph=True."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lctrain.kernels import flash_attn_varlen_func, rms_norm

ENDS = torch.tensor([0, 2, 6], dtype=torch.int32)


def attention(x):
    q = x.view(6, 2, 8)
    out, lse = flash_attn_varlen_func(
        q, q, q, ENDS, ENDS, 4, 4, causal=True, return_lse=True, backend="pytorch"
    )
    return out.square().sum() + lse.sin().sum()


def norm(x):
    return rms_norm(x, torch.linspace(1, 2, 16), backend="pytorch").sin().sum()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("function", [attention, norm])
def test_the_first_derivative_is_the_same_and_the_second_an_error(function, checkpointed):
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = torch.autograd.grad(function(x), x)
    result = checkpoint(function, x, use_reentrant=False) if checkpointed else function(x)
    (found,) = torch.autograd.grad(result, x, create_graph=True)
    assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(found.sum(), x)
