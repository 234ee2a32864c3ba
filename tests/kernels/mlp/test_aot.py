"""Compares the ahead-of-time variants of the activations with the arguments of their launchers."""

import pytest
import torch

from lctrain_kernels.mlp import aot, launch
from tests.kernels.launches import DTYPES, describe_for_a_compiler, launches_of


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("flag", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("activation", launch.ACTIVATION_NUMBERS)
def test_variants_are_what_is_launched(activation, flag, dtype, monkeypatch):
    """`flag` is the product written by the gated backward, and the bias of the other kernels."""
    describe_for_a_compiler(aot, monkeypatch)
    launches = launches_of(launch, monkeypatch)
    x = torch.zeros(4, 64, dtype=DTYPES[dtype])
    launch.gated_fwd(x, x, activation)
    launch.gated_bwd(x, x, x, activation, x, x, x if flag else None)
    forward, backward = aot.gated_variants(activation, dtype, writes_product=flag)
    launches["gated_fwd_kernel"].assert_described_by(forward)
    launches["gated_bwd_kernel"].assert_described_by(backward)
    monkeypatch.setattr(launch, "column_sum", lambda parts, dtype: parts)
    bias = x[0] if flag else None
    launch.bias_gelu_fwd(x, bias, activation)
    launch.bias_gelu_bwd(x, x, bias, activation)
    forward, backward = aot.bias_gelu_variants(activation, dtype, has_bias=flag)
    launches["bias_gelu_fwd_kernel"].assert_described_by(forward)
    launches["bias_gelu_bwd_kernel"].assert_described_by(backward)
