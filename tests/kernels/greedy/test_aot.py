"""Compares the ahead-of-time variants of the most probable token with its launcher."""

import pytest
import torch

from lctrain_kernels.greedy import aot, launch
from tests.kernels.launches import DTYPES, describe_for_a_compiler, launches_of


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_variants_are_what_is_launched(dtype, monkeypatch):
    describe_for_a_compiler(aot, monkeypatch)
    launches = launches_of(launch, monkeypatch)
    launch.most_probable(torch.zeros(4, 64, dtype=DTYPES[dtype]))
    launches["most_probable_kernel"].assert_described_by(aot.most_probable_variant(dtype))
