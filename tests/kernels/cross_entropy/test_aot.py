"""Compares the loss's ahead-of-time variants with the arguments of its launchers."""

import pytest
import torch

from lctrain_kernels.cross_entropy import aot, rows, triton_kernels
from lctrain_kernels.cross_entropy.options import LossOptions
from tests.kernels.launches import DTYPES, describe_for_a_compiler, launches_of


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "all"])
@pytest.mark.parametrize("name", aot.PASSES)
def test_variants_are_what_is_launched(name, everything, dtype, monkeypatch):
    describe_for_a_compiler(aot, monkeypatch)
    monkeypatch.setattr(rows, "multiprocessors", lambda device: 132)
    launches = launches_of(triton_kernels, monkeypatch)
    logits = torch.zeros(4, 64, dtype=DTYPES[dtype])
    reads, writes = aot.PASSES[name]
    part = 0.1 if everything else 0.0
    options = LossOptions(part, 1.0, -100, part, 0.0, 0, 64, "", 4, logits.dtype, False, "triton")
    grad = torch.ones(4) if reads else None
    rows.row_pass(
        logits,
        logits[0] if everything else None,
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(rows.NUM_STATISTICS, 4),
        grad,
        grad if everything else None,
        options,
        reads_statistics=reads,
        writes_gradient=writes,
    )
    variant = aot.row_pass_variant(name, dtype, everything=everything)
    launches["row_pass_kernel"].assert_described_by(variant)
    rows.scale_to(torch.zeros(4, 64), torch.ones(()), logits.dtype, "triton")
    launches["scale_kernel"].assert_described_by(aot.scale_variant(dtype))
