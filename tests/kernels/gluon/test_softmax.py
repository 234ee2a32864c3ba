"""Runs the PTX of the Hopper kernels' online softmax in the emulator."""

import numpy as np
import pytest
import torch

from lctrain_kernels.gluon.softmax import (
    INITIAL_MAX,
    RAISE_MAX,
    RAISE_MAX_CONSTRAINTS,
    known_max_assembly,
    known_max_constraints,
)
from tests.kernels.gluon_emulator.assembly import run_on_rows
from tests.numerics import near_roundings


def test_a_maximum_is_raised_where_a_row_exceeds_it_by_more():
    generator = np.random.default_rng(0)
    before = np.repeat(generator.normal(size=(64, 1)) * 4, 4, axis=1).astype(np.float32)
    before[::9] = INITIAL_MAX.value
    largest = (generator.normal(size=(64, 4)) * 20).astype(np.float32)
    largest[::9, 1:] = -np.inf
    # A warp in which no row does.
    seen = before[32:48] != INITIAL_MAX.value
    largest[32:48] = np.where(seen, np.where(seen, before[32:48], 0) * 2 + 10, -np.inf)
    total = generator.random((64, 4)).astype(np.float32)
    m, alpha, rescale = run_on_rows(
        RAISE_MAX.value, RAISE_MAX_CONSTRAINTS.value, 2, [before, total, largest, np.float32([0.5])]
    )
    top = largest.max(axis=1, keepdims=True) * np.float32(0.5)
    raised = top - before > 8
    assert raised.any()
    assert not raised[32:48].any()
    np.testing.assert_array_equal(m, np.where(raised, top, before))
    np.testing.assert_array_equal(alpha, np.exp2(before - m))
    np.testing.assert_array_equal(rescale, total * alpha)


@pytest.mark.parametrize("half", ["bf16", "f16"])
def test_weights_of_a_further_block(half):
    generator = np.random.default_rng(1)
    elements, multiplier = 32, np.float32(0.5)
    s = (generator.normal(size=(64, 8, 4, 2)) * 8).astype(np.float32)
    s[5] = -np.inf
    before = np.repeat(generator.normal(size=(64, 1)) * 4 + 8, 4, axis=1).astype(np.float32)
    before[[5, 6, 40]] = INITIAL_MAX.value  # nothing seen so far, and here by the last two alone
    s[20, 3, 1, 0] = 2000.0  # beyond what 2^(s - m) can be
    s[21, 2, 0, 1] = 2 * before[21, 0] + 24  # 2^12: no new m
    total = generator.random((64, 4)).astype(np.float32)
    operands = [s, before[:, None, :, None], total[:, None, :, None], multiplier.reshape(1)]
    p, found = run_on_rows(
        known_max_assembly(elements, half), known_max_constraints(elements), elements, operands
    )
    m, alpha, sums = found[:, 0, :, 0], found[:, 0, :, 1], found[:, 1, :, 0]
    raised = np.zeros(64, np.bool_)
    raised[[6, 20, 40]] = True
    top = s.max(axis=(1, 2, 3))[:, None] * multiplier
    np.testing.assert_array_equal(m, np.where(raised[:, None], top, before))
    with np.errstate(under="ignore"):
        np.testing.assert_array_equal(alpha, np.exp2(before - m))
        exact = np.exp2(s * np.float64(multiplier) - m[:, None, :, None])
    assert 2**11 < exact.max() < 2**13
    dtype = torch.bfloat16 if half == "bf16" else torch.float16
    assert p == near_roundings(exact, 2, dtype)
    # 16 additions to each sum, and exponents below 64 that are rounded before 2^x
    assert sums == near_roundings(total * alpha + exact.sum(axis=(1, 3)), 2 * (16 + 64))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3000.0], ids=str)
def test_a_row_keeps_its_bits_whatever_the_others_of_its_warp(value):
    generator = np.random.default_rng(2)
    elements = 32
    s = generator.normal(size=(64, 8, 4, 2)).astype(np.float32)
    before = np.repeat(generator.normal(size=(64, 1)), 4, axis=1).astype(np.float32)
    total = generator.random((64, 4)).astype(np.float32)
    rest = (before[:, None, :, None], total[:, None, :, None], np.float32([0.5]))
    run = (known_max_assembly(elements, "bf16"), known_max_constraints(elements), elements)
    alone = run_on_rows(*run, [s, *rest])
    disturbed = s.copy()
    disturbed[[3, 17], 5, 2, 1] = value
    beside = run_on_rows(*run, [disturbed, *rest])
    others = np.setdiff1d(np.arange(64), [3, 17])
    np.testing.assert_array_equal(beside[0][others], alone[0][others])
    np.testing.assert_array_equal(beside[1][others][:, :2], alone[1][others][:, :2])
    assert not np.array_equal(beside[0][3], alone[0][3])
