"""token_mean: a mean over tokens, with its standard error over documents."""

from __future__ import annotations

import math

import numpy as np

from lctrain.instances import require_instance


def token_mean(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Returns the mean of a quantity over all tokens, and its standard error over documents.

    The tokens of a document are not independent, so the documents are the sample. Let S_d be the
    sum of the quantity over the n_d tokens of document d. The mean R = sum S_d / sum n_d is a ratio
    of two sums over D documents, and its variance by linearisation is

        var(R) = D / (D - 1) * sum (S_d - R n_d)^2 / (sum n_d)^2.

    This is the estimator of cluster sampling (Cochran, Sampling Techniques, 3rd edition, sections
    6.3 and 9A.1). For documents of one token each it equals s^2 / D.

    Args:
        sums: [D] float64, sum of the quantity over the tokens of each document (S_d).
        counts: [D] integers, number of tokens of each document (n_d), all at least 1.

    Returns:
        The mean R and its standard error, which is NaN for a single document.
    """
    for name, given in (("sums", sums), ("counts", counts)):
        require_instance(name, given, np.ndarray, "Pass one number per document.")
    documents, total = len(sums), float(counts.sum())
    mean = float(sums.sum()) / total
    if documents < 2:
        return mean, math.nan
    residuals = sums - mean * counts
    variance = documents / (documents - 1) * float(residuals @ residuals) / total**2
    return mean, math.sqrt(variance)
