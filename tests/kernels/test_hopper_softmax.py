"""The PTX of the Hopper kernels' online softmax, run by the emulator."""

import numpy as np
import pytest

from lctrain.kernels.hopper.softmax import (
    RAISE,
    RAISE_CONSTRAINTS,
    UNSEEN,
    polynomial_groups,
    weights_assembly,
    weights_constraints,
)
from tests.kernels.gluon_emulator.assembly import run_on_rows


@pytest.mark.parametrize("fma_keys", [8, 16, 40, 64])
@pytest.mark.parametrize("m", [0.0, -3.7, 90.3])
def test_weights_from_a_polynomial(m, fma_keys):
    """Of exponents up to the 8 that m may be behind by, as exact as half precision needs."""
    multiplier = np.float32(0.18)
    exponent = np.linspace(-160, 8, 64 * 128).reshape(64, 16, 4, 2)
    s = ((exponent + m) / multiplier).astype(np.float32)
    s[::7, ::3] = -np.inf
    numbers = np.float32([multiplier, m, multiplier / 256, (127 - m) / 256])
    (found,) = run_on_rows(
        weights_assembly(fma_keys), weights_constraints(), 32, [s, *numbers.reshape(4, 1)]
    )
    exact = np.exp2(s.astype(np.float64) * multiplier - np.float32(m))
    normal = exact > 2.0**-126
    error = np.abs(found - exact)
    assert (error <= 1e-4 * exact)[normal].all()
    assert (np.abs(found[~normal]) < 2.0**-125).all()
    assert (found[s == -np.inf] == 0).all()
    chosen = np.isin(np.arange(16) % 8, polynomial_groups(fma_keys))
    assert chosen.sum() * 8 == 2 * fma_keys
    assert (error <= 3e-5 * exact)[:, ~chosen][normal[:, ~chosen]].all()


def test_a_maximum_is_raised_where_a_row_exceeds_it_by_more():
    generator = np.random.default_rng(0)
    before = np.repeat(generator.normal(size=(64, 1)) * 4, 4, axis=1).astype(np.float32)
    before[::9] = UNSEEN.value
    largest = (generator.normal(size=(64, 4)) * 20).astype(np.float32)
    largest[::9, 1:] = -np.inf
    # A warp in which no row does.
    seen = before[32:48] != UNSEEN.value
    largest[32:48] = np.where(seen, np.where(seen, before[32:48], 0) * 2 + 10, -np.inf)
    total = generator.random((64, 4)).astype(np.float32)
    m, alpha, scaled = run_on_rows(
        RAISE.value, RAISE_CONSTRAINTS.value, 2, [before, total, largest, np.float32([0.5])]
    )
    top = largest.max(axis=1, keepdims=True) * np.float32(0.5)
    raised = top - before > 8
    assert raised.any()
    assert not raised[32:48].any()
    np.testing.assert_array_equal(m, np.where(raised, top, before))
    np.testing.assert_array_equal(alpha, np.exp2(before - m))
    np.testing.assert_array_equal(scaled, total * alpha)
