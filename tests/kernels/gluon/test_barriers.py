"""Tests that a Hopper kernel whose named barriers overlap does not compile."""

import pytest

from lctrain_kernels.gluon.barriers import MOST_STAGES, barrier_numbers, barriers_fit

KERNELS = ("forward", "varlen_bwd", "dual_chunk_bwd", "differential_bwd")


@pytest.mark.parametrize("kernel", KERNELS)
def test_barriers_are_disjoint_and_not_tritons_own(kernel):
    for stages in range(2, MOST_STAGES):
        assert barriers_fit(kernel, stages)
        numbers = [number for used in barrier_numbers(kernel, stages).values() for number in used]
        assert len(set(numbers)) == len(numbers)
        assert min(numbers) >= 3
        assert max(numbers) < 16


def test_a_fourth_stage_overlaps_where_ds_has_its_barriers():
    fits = {kernel: barriers_fit(kernel, 4) for kernel in KERNELS}
    assert fits == {
        "forward": True,
        "varlen_bwd": True,
        "dual_chunk_bwd": True,
        "differential_bwd": False,
    }
    assert not barriers_fit("forward", 5)
