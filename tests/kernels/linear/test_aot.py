"""Compares the ahead-of-time variants of linear layers with the arguments of their launcher."""

import pytest
import torch

from lctrain_kernels.linear import aot, launch
from lctrain_kernels.linear.launch_config import TABLES, override_linear_tile
from tests.kernels.launches import DTYPES, describe_for_a_compiler, launches_of

TUNED = TABLES["sm_90"]


@pytest.mark.parametrize(
    ("tile", "dtype", "has_bias", "even"),
    [
        (TABLES["sm_80"].wide, "bf16", False, True),
        (TUNED.wide, "bf16", False, True),
        (TUNED.wide, "bf16", True, True),
        (TUNED.wide, "bf16", False, False),
        (TUNED.narrow, "bf16", False, True),
        (TUNED.few, "bf16", False, True),
        (TABLES["float32"].wide, "fp32", False, True),
    ],
)
def test_variants_are_what_is_launched(tile, dtype, has_bias, even, monkeypatch):
    describe_for_a_compiler(aot, monkeypatch)
    launches = launches_of(launch, monkeypatch)
    width = 128 if even else 136
    x, weight = torch.zeros(4, width, dtype=DTYPES[dtype]), torch.zeros(48, width)
    bias = torch.zeros(48, dtype=x.dtype) if has_bias else None
    with override_linear_tile(tile):
        launch.linear_into(x, weight.to(x.dtype), bias, x.new_empty(4, 48))
    variant = aot.linear_variant(tile, dtype, has_bias=has_bias, even=even)
    launches["batch_invariant_linear_kernel"].assert_described_by(variant)
    assert variant.name in {one.name for one in aot.kernel_variants()}
