"""Intervals of means over items that cover the true mean in 95 of 100 cases."""

from __future__ import annotations

import math

import numpy as np

from lctrain.eval.ratio import token_mean

LEVEL = 0.95
RESAMPLES = 1000
EQUAL = 6
"""Fewest equal values whose interval has no width: five signs are the same in 1 of 16 cases (p =
0.0625), six in 1 of 32."""
_NORMAL = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def bootstrap_interval(
    sums: np.ndarray, counts: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Returns a 95 % interval of a mean over tokens, by resampling documents.

    It is the studentized bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap,
    section 12.5) with the standard error of `token_mean`. With few documents, as is common here,
    plain percentiles of resampled means are too narrow.

    Args:
        sums: [D] float64, sum of the quantity over the tokens of each document.
        counts: [D] number of tokens of each document, all at least 1.
        seed: Seed of the resampling.
        resamples: Number of resampled sets of documents.

    Returns:
        The lower and the upper end; NaN for fewer than three documents, and for fewer than EQUAL
        documents whose means are all the same, which say nothing about the spread of others.
    """
    documents = len(sums)
    mean, stderr = token_mean(sums, counts)
    if documents < 3 or not math.isfinite(mean):
        return math.nan, math.nan
    if stderr == 0:
        return (mean, mean) if documents >= EQUAL else (math.nan, math.nan)
    order = np.lexsort((sums, counts))  # the interval does not depend on the order of documents
    sums, counts = sums[order], np.asarray(counts, dtype=np.float64)[order]
    drawn = np.random.default_rng(seed).integers(documents, size=(resamples, documents))
    s, n = sums[drawn], counts[drawn]  # [resamples, D]
    totals = n.sum(axis=1)
    means = s.sum(axis=1) / totals
    squares = ((s - means[:, None] * n) ** 2).sum(axis=1)
    errors = np.sqrt(documents / (documents - 1) * squares) / totals
    usable = errors > stderr * 1e-6  # a resample of one document has no spread
    if not usable.any():
        return math.nan, math.nan
    ratios = (means[usable] - mean) / errors[usable]
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return mean - high * stderr, mean - low * stderr


def share_interval(mean: float, items: int) -> tuple[float, float]:
    """Returns the 95 % interval of Wilson for a mean of items in [0, 1].

    It is exact enough for few items, and keeps a width where all items are right. Items with parts
    of a point vary less than items of zero and one, so it is then too wide rather than too narrow.

    Args:
        mean: Mean of the items.
        items: Number of items, at least 1.
    """
    square = _NORMAL**2 / items
    centre = (mean + square / 2) / (1 + square)
    half = _NORMAL / (1 + square) * math.sqrt(mean * (1 - mean) / items + square / (4 * items))
    return max(0.0, centre - half), min(1.0, centre + half)
