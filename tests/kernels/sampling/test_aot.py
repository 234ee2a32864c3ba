"""Compares the ahead-of-time variants of the most probable token with its launcher."""

import pytest
import torch

from lctrain_kernels.sampling import aot, launch
from tests.kernels.launches import DTYPES, describe_for_a_compiler, launches_of


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_variants_are_what_is_launched(dtype, monkeypatch):
    describe_for_a_compiler(aot, monkeypatch)
    launches = launches_of(launch, monkeypatch)
    launch.most_probable(torch.zeros(4, 64, dtype=DTYPES[dtype]))
    launches["most_probable_kernel"].assert_described_by(aot.most_probable_variant(dtype))


@pytest.mark.parametrize("has_top_p", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_variants_of_draws_are_what_is_launched(dtype, has_top_p, monkeypatch):
    describe_for_a_compiler(aot, monkeypatch)
    launches = launches_of(launch, monkeypatch)
    logits = torch.zeros(4, 64, dtype=DTYPES[dtype])
    keys, numbers = (torch.zeros(size, dtype=torch.int32) for size in ((4, 3), (64,)))
    launch.draw(logits, keys, numbers, 0.7, 0.9 if has_top_p else 1.0)
    described = aot.draw_variant(dtype, has_top_p=has_top_p)
    launches["draw_kernel"].assert_described_by(described)
