"""The order of rows: which row every rank sees at every step of an epoch.

A pure function of (costs, world size, seed, epoch), so that a resumed run repeats it. Ranks wait
for one another at every step, and attention makes rows of equal tokens unequal work (the sum of
squared document lengths). So rows of similar work share a step: the shuffled rows are sorted by
work within blocks of 64 steps, neighbours form a step, and the steps are shuffled again. Inside a
step the heaviest row goes to the rank that has done least so far.
"""

from __future__ import annotations

import numpy as np

_STEPS_PER_BLOCK = 64  # larger: better balance; smaller: more mixing of rows between steps


def epoch_order(costs: np.ndarray, world_size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the rows of one epoch: [steps, world_size] int64.

    Every row occurs at most once. The rest of a division by world_size is left out, other rows in
    every epoch.

    Args:
        costs: [R] attention work of every row.
        world_size: Number of ranks.
        seed: Seed of the run.
        epoch: Number of the epoch.
    """
    random = np.random.default_rng([seed, epoch])
    steps = len(costs) // world_size
    rows = random.permutation(len(costs))[: steps * world_size]
    if world_size == 1:
        return rows[:, None]
    blocks = [_similar(rows_b, costs, world_size, random) for rows_b in _blocks(rows, world_size)]
    return _balance(np.concatenate(blocks), costs) if blocks else rows.reshape(0, world_size)


def imbalance(order: np.ndarray, costs: np.ndarray) -> float:
    """Time lost to waiting: the sum over steps of the heaviest rank's work, over that of the mean.

    Args:
        order: [steps, world_size] int64 rows.
        costs: [R] attention work of every row.
    """
    work = costs[order]
    return float(work.max(axis=1).sum() / work.mean(axis=1).sum())


def _blocks(rows: np.ndarray, world_size: int) -> list[np.ndarray]:
    steps = len(rows) // world_size
    if steps == 0:
        return []
    count = max(1, round(steps / _STEPS_PER_BLOCK))
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
