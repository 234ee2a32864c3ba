"""Means over tokens whose uncertainty comes from documents."""

from __future__ import annotations

import math

import numpy as np


def token_mean(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Token-weighted mean of a per-token quantity, and its standard error over documents.

    The tokens of one document are not independent, so documents are the sample. With S_d the sum
    over the n_d tokens of document d, the mean R = sum S_d / sum n_d is a ratio of two sums over D
    sampled documents. Its variance by linearisation (the estimator of cluster sampling: Cochran,
    Sampling Techniques, 3rd edition, sections 6.3 and 9A.1) is

        var(R) = D / (D - 1) * sum (S_d - R n_d)^2 / (sum n_d)^2.

    With documents of one token each, it is the usual s^2 / D.

    Args:
        sums: [D] float64, S_d.
        counts: [D] n_d, all at least 1.

    Returns:
        R and its standard error, which is NaN for a single document.
    """
    documents, total = len(sums), float(counts.sum())
    mean = float(sums.sum()) / total
    if documents < 2:
        return mean, math.nan
    residuals = sums - mean * counts
    variance = documents / (documents - 1) * float(residuals @ residuals) / total**2
    return mean, math.sqrt(variance)
