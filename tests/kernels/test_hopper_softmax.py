"""The PTX of the Hopper kernels' online softmax, run by the emulator."""

import numpy as np

from lctrain.kernels.hopper.softmax import RAISE, RAISE_CONSTRAINTS, UNSEEN
from tests.kernels.gluon_emulator.assembly import run_on_rows


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
