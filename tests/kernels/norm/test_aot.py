"""Compares the ahead-of-time variants of the norms with the arguments of their launchers."""

import pytest
import torch

from lctrain_kernels.norm import aot, launch
from lctrain_kernels.norm.config import BACKWARD, FORWARD, norm_config
from lctrain_kernels.norm.options import NormOptions
from tests.kernels.launches import DTYPES, describe_for_a_compiler, launches_of

LISTED = [(*case, "bf16") for case in aot.cases()] + [(1024, "add_rms", "fp32")]


@pytest.mark.parametrize(("columns", "norm", "dtype"), LISTED)
def test_variants_are_what_is_launched(columns, norm, dtype, monkeypatch):
    describe_for_a_compiler(aot, monkeypatch)
    launches = launches_of(launch, monkeypatch)
    x, weight = torch.zeros(4, columns, dtype=DTYPES[dtype]), torch.ones(columns)
    weight = weight.to(x.dtype)
    layer, added = norm.endswith("layer"), norm.startswith("add_")
    options = NormOptions(1e-6, 0.0, norm.endswith("gemma"), layer)
    bias = weight if layer else None
    y, total, mean, rstd = launch.norm_fwd(x, x if added else None, weight, bias, options)
    launches["norm_fwd_kernel"].assert_described_by(aot.forward_variant(columns, norm, dtype))
    dsum = total if added else None
    launch.norm_bwd(y, dsum, x, weight, mean, rstd, options, True, layer)
    launches["norm_bwd_kernel"].assert_described_by(aot.backward_variant(columns, norm, dtype))
    launches["column_sum_kernel"].assert_described_by(
        aot.column_sum_variant(columns, 1 + layer, dtype)
    )


@pytest.mark.parametrize("table", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_every_tile_is_listed(table):
    blocks = [launch.next_power_of_2(columns) for columns, _ in aot.cases()]
    assert {norm_config(table, block) for block in blocks} == set(table.values())
