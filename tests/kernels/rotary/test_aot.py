"""Compares the ahead-of-time variants of the rotations with the arguments of their launchers."""

import pytest
import torch

from lctrain_kernels.rotary import aot, launch
from lctrain_kernels.rotary.options import RotaryOptions
from tests.kernels.launches import DTYPES, describe_for_a_compiler, launches_of


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("case", aot.CASES, ids=lambda case: case.name)
def test_variants_are_what_is_launched(case, dtype, monkeypatch):
    describe_for_a_compiler(aot, monkeypatch)
    launches = launches_of(launch, monkeypatch)
    monkeypatch.setattr(launch, "column_sum", lambda parts, dtype: parts)
    kind, tokens = DTYPES[dtype], 6
    q = torch.zeros(tokens, case.q_heads, case.head_dim, dtype=kind)
    k = torch.zeros(tokens, case.k_heads, case.head_dim, dtype=kind) if case.k_heads else None
    cos = torch.zeros(tokens, case.rotary, dtype=kind)
    if not case.published:
        cos = torch.zeros(tokens, case.rotary // 2)
    positions = None if case.published else torch.arange(tokens)
    weights = [torch.ones(case.head_dim, dtype=kind) if case.has_norm else None] * 2
    options = RotaryOptions(not case.published, case.published, 1e-6, 0.0, "triton")
    launch.rotate(q, k, cos, cos, positions, *weights, options, inverse=case.inverse)
    launches["rotary_kernel"].assert_described_by(aot.forward_variant(case, dtype))
    if case.has_norm:
        launch.norm_rotary_bwd(q, q, cos, cos, positions, weights[0], options)
        variant = aot.backward_variant(case, case.q_heads, dtype)
        launches["norm_rotary_bwd_kernel"].assert_described_by(variant)
