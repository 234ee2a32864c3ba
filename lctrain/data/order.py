"""The order of rows: the row of every rank at every step of an epoch.

A pure function of (costs, world size, seed, epoch, window), so that a resumed run repeats it. Ranks
wait for one another at every step, and attention makes rows of equal tokens unequal work (the sum
of squared document lengths). So rows of similar work share a step: the shuffled rows are sorted by
work within windows of steps, neighbours form a step, and the steps are shuffled again. Inside a
step the heaviest row goes to the rank that has done least so far.
"""

from __future__ import annotations

import numpy as np

BALANCE_WINDOW = 256
"""Default steps of a window.

Over 8 ranks, on log-normal documents (32k rows, sigma 1.0; 128k rows, sigma 1.5), the heaviest rank
of a step does 1.010 and 1.014 times the mean work; windows of 64 steps give 1.042 and 1.052.
"""


def epoch_order(
    costs: np.ndarray, world_size: int, seed: int, epoch: int, window: int = BALANCE_WINDOW
) -> np.ndarray:
    """Returns the rows of one epoch: [steps, world_size] int64.

    Every row occurs at most once. The rest of a division by world_size is left out, other rows in
    every epoch.

    Args:
        costs: [R] attention work of every row.
        world_size: Number of ranks.
        seed: Seed of the run.
        epoch: Number of the epoch.
        window: Steps within which rows are sorted by work. A longer window balances better; a
            shorter one keeps more of the shuffle.
    """
    random = np.random.default_rng([seed, epoch])
    steps = len(costs) // world_size
    rows = random.permutation(len(costs))[: steps * world_size]
    if world_size == 1:
        return rows[:, None]
    windows = _windows(rows, world_size, window)
    steps_of = [_similar(rows_w, costs, world_size, random) for rows_w in windows]
    return _balance(np.concatenate(steps_of), costs) if steps_of else rows.reshape(0, world_size)


def imbalance(order: np.ndarray, costs: np.ndarray) -> float:
    """Returns the time lost to waiting: the heaviest rank's work over the mean, summed over steps.

    Args:
        order: [steps, world_size] int64 rows.
        costs: [R] attention work of every row.
    """
    work = costs[order]
    return float(work.max(axis=1).sum() / work.mean(axis=1).sum())


def _windows(rows: np.ndarray, world_size: int, window: int) -> list[np.ndarray]:
    steps = len(rows) // world_size
    if steps == 0:
        return []
    count = max(1, round(steps / window))
    cuts = np.linspace(0, steps, count + 1).astype(np.int64)[1:-1] * world_size
    return np.split(rows, cuts)


def _similar(
    rows: np.ndarray, costs: np.ndarray, world_size: int, random: np.random.Generator
) -> np.ndarray:
    """Steps of rows with neighbouring work, in random order: [steps, world_size]."""
    steps = rows[np.argsort(costs[rows], kind="stable")].reshape(-1, world_size)
    return random.permutation(steps)


def _balance(steps: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Gives the rows of each step, heaviest first, to the ranks that have done least.

    So the totals of two ranks never differ by more than two rows of one step do.
    """
    done = np.zeros(steps.shape[1])
    balanced = np.empty_like(steps)
    for step, rows in enumerate(steps):
        ranks = np.argsort(done, kind="stable")
        balanced[step, ranks] = rows[::-1]  # rows are in rising order of work
        done[ranks] += costs[rows[::-1]]
    return balanced
