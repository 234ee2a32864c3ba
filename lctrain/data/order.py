"""Computes which rows form each optimizer step of an epoch, and which rank gets each row.

A step has one row per pack: one per rank, or one per rank and accumulated micro-batch. The order is
a pure function of (costs, packs, seed, epoch, window), so a resumed run repeats it. Rows with
equally many tokens differ in attention work, the sum of the squared document lengths, and the ranks
of a step wait for the slowest one. So the rows of a step are chosen with similar work:

1. The rows are shuffled, and sorted by work within windows of steps.
2. Neighbours in this order form a step, and the steps of a window are shuffled.
3. Within a step, the heaviest row goes to the rank with the least work so far.
"""

from __future__ import annotations

import numpy as np

BALANCE_WINDOW = 256
"""Default number of steps in a window.

With 8 ranks and log-normal document lengths, the heaviest rank of a step has 1.010 times the mean
work for 32k rows and sigma 1.0, and 1.014 times for 128k rows and sigma 1.5. Windows of 64 steps
give 1.042 and 1.052.
"""


def epoch_order(
    costs: np.ndarray, packs: int, seed: int, epoch: int, window: int = BALANCE_WINDOW
) -> np.ndarray:
    """Returns the rows of every step of one epoch: [steps, packs] int64.

    Every row occurs at most once. If the number of rows is not a multiple of packs, the remaining
    rows are left out; they differ between epochs.

    Args:
        costs: [R] attention work of every row.
        packs: Number of packs of a step: of all ranks, or of all micro-batches of all ranks.
        seed: Seed of the shuffle.
        epoch: Number of the epoch.
        window: Number of steps within which rows are sorted by work. A longer window balances the
            packs better; a shorter window keeps the order closer to a random one. With a window of
            1 the rows of every step are drawn at random.
    """
    random = np.random.default_rng([seed, epoch])
    steps = len(costs) // packs
    rows = random.permutation(len(costs))[: steps * packs]
    if packs == 1:
        return rows[:, None]
    windows = _windows(rows, packs, window)
    steps_of = [_similar(rows_w, costs, packs, random) for rows_w in windows]
    return _balance(np.concatenate(steps_of), costs) if steps_of else rows.reshape(0, packs)


def imbalance(order: np.ndarray, costs: np.ndarray) -> float:
    """Returns the work of the heaviest rank of a step over the mean work of the ranks, >= 1.

    Both are summed over all steps. If time is proportional to work, the run takes this many times
    as long as with perfectly balanced ranks, since ranks wait for one another.

    Args:
        order: [steps, world_size] int64 rows.
        costs: [R] attention work of every row.
    """
    work = costs[order]
    return float(work.max(axis=1).sum() / work.mean(axis=1).sum())


def _windows(rows: np.ndarray, packs: int, window: int) -> list[np.ndarray]:
    steps = len(rows) // packs
    if steps == 0:
        return []
    count = max(1, round(steps / window))
    cuts = np.linspace(0, steps, count + 1).astype(np.int64)[1:-1] * packs
    return np.split(rows, cuts)


def _similar(
    rows: np.ndarray, costs: np.ndarray, packs: int, random: np.random.Generator
) -> np.ndarray:
    """Groups rows of similar work into steps, in random order: [steps, packs]."""
    steps = rows[np.argsort(costs[rows], kind="stable")].reshape(-1, packs)
    return random.permutation(steps)


def _balance(steps: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Assigns the rows of each step to ranks: the heaviest to the rank with the least work so far.

    So the total work of two ranks never differs by more than the largest difference in work between
    two rows of the same step.

    Args:
        steps: [steps, ranks] rows of every step, in rising order of work within the step.
        costs: [R] attention work of every row.

    Returns:
        [steps, ranks], the same rows; column r has those of rank r.
    """
    done = np.zeros(steps.shape[1])
    balanced = np.empty_like(steps)
    for step, rows in enumerate(steps):
        ranks = np.argsort(done, kind="stable")
        balanced[step, ranks] = rows[::-1]  # rows are in rising order of work
        done[ranks] += costs[rows[::-1]]
    return balanced


def micro_batches(steps: np.ndarray, costs: np.ndarray, ranks: int) -> np.ndarray:
    """Divides the rows of every optimizer step into micro-batches of one row per rank.

    Rows of similar work are in one micro-batch, and the heaviest goes to the rank with the least
    work so far. Which rows belong to a step does not depend on the number of ranks.

    Args:
        steps: [steps, packs] int64, the rows of every optimizer step.
        costs: [R] attention work of every row.
        ranks: Number of ranks, which divides `packs`.

    Returns:
        [steps * packs / ranks, ranks] int64.
    """
    if steps.shape[1] == ranks:
        return steps
    sorted_rows = np.take_along_axis(steps, np.argsort(costs[steps], axis=1, kind="stable"), axis=1)
    return _balance(sorted_rows.reshape(-1, ranks), costs)
