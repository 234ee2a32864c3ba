"""Tests the order of rows: deterministic, complete, and balanced by attention work."""

import numpy as np
import pytest

from lctrain.data.order import epoch_order, imbalance
from lctrain.data.packing import plan_rows

COSTS = np.random.default_rng(0).lognormal(mean=18, sigma=1.0, size=1003)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_every_row_at_most_once_and_only_the_rest_left_out(world_size):
    order = epoch_order(COSTS, world_size, seed=0, epoch=0)
    assert order.shape == (1003 // world_size, world_size)
    assert len(np.unique(order)) == order.size


@pytest.mark.parametrize("world_size", [1, 4])
def test_is_a_pure_function_of_seed_and_epoch(world_size):
    first = epoch_order(COSTS, world_size, seed=3, epoch=5)
    assert np.array_equal(first, epoch_order(COSTS, world_size, seed=3, epoch=5))
    assert not np.array_equal(first, epoch_order(COSTS, world_size, seed=3, epoch=6))
    assert not np.array_equal(first, epoch_order(COSTS, world_size, seed=4, epoch=5))


def test_other_rows_are_left_out_in_other_epochs():
    everything = set(range(1003))
    left_out = [everything - set(epoch_order(COSTS, 8, 0, e).flatten().tolist()) for e in range(4)]
    assert all(len(rows) == 3 for rows in left_out)
    assert len(set.union(*left_out)) > 3


@pytest.mark.parametrize("world_size", [2, 8])
def test_work_within_a_step_is_balanced(world_size):
    order = epoch_order(COSTS, world_size, seed=0, epoch=0)
    shuffled = np.random.default_rng(1).permutation(order.size).reshape(order.shape)
    waiting = imbalance(order, COSTS) - 1
    assert waiting < 0.15 * (imbalance(shuffled, COSTS) - 1)


@pytest.mark.parametrize("world_size", [2, 8])
def test_totals_of_ranks_differ_by_no_more_than_one_step_does(world_size):
    work = COSTS[epoch_order(COSTS, world_size, seed=0, epoch=0)]
    totals = work.sum(axis=0)
    assert totals.max() - totals.min() <= (work.max(axis=1) - work.min(axis=1)).max()
    assert totals.max() / totals.mean() < 1.05


@pytest.mark.parametrize(
    ("max_tokens", "sigma", "documents"), [(32_768, 1.0, 100_000), (131_072, 1.5, 200_000)]
)
def test_balance_over_eight_ranks_on_log_normal_documents(max_tokens, sigma, documents):
    lengths = np.random.default_rng(0).lognormal(6.5, sigma, documents)
    plan = plan_rows(np.maximum(16, lengths).astype(np.int64), max_tokens)
    assert plan.report.fill >= 0.98
    work = plan.costs()[epoch_order(plan.costs(), 8, seed=0, epoch=0)]
    assert (work.max(axis=1) / work.mean(axis=1)).mean() <= 1.02
    steps = len(work) // 4 * 4
    of_four_packs = work[:steps].reshape(-1, 4, 8).sum(axis=1)
    assert (of_four_packs.max(axis=1) / of_four_packs.mean(axis=1)).mean() <= 1.05


def test_a_longer_window_balances_better():
    waiting = [imbalance(epoch_order(COSTS, 8, 0, 0, window), COSTS) for window in (1, 8, 64)]
    assert waiting[0] > waiting[1] > waiting[2] > 1.0


def test_light_and_heavy_steps_are_mixed():
    means = COSTS[epoch_order(COSTS, 8, seed=0, epoch=0)].mean(axis=1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


def test_imbalance_of_equal_work_is_one():
    assert imbalance(np.arange(6).reshape(3, 2), np.ones(6)) == 1.0


def test_fewer_rows_than_ranks_make_no_step():
    assert epoch_order(np.ones(3), 4, 0, 0).shape == (0, 4)


def test_a_window_of_one_step_draws_its_rows_at_random():
    shuffled = np.random.default_rng([5, 2]).permutation(len(COSTS))
    drawn = epoch_order(COSTS, 8, seed=5, epoch=2, window=1)
    expected = shuffled[: drawn.size].reshape(drawn.shape)
    assert np.array_equal(np.sort(drawn, axis=1), np.sort(expected, axis=1))
