"""Windows: how documents are cut so that every token is scored once with a bounded context.

Positions are those of the inputs: position p of a document of n tokens holds token p and predicts
token p + 1, so there are n - 1 of them, and p + 1 tokens are its full context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Windows:
    """Parts of documents to run through the model, and the part of each that is scored. W windows.

    Attributes:
        documents: [W] int64, index of the document.
        starts: [W] int64, first position of the window.
        scored_from: [W] int64, first position that is scored; those before are only context.
        stops: [W] int64, end of the window and of the scored positions, exclusive.
        prefixes: [W] int64, begin tokens that are put before the window.
    """

    documents: np.ndarray
    starts: np.ndarray
    scored_from: np.ndarray
    stops: np.ndarray
    prefixes: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each window, begin tokens included: [W] int64."""
        return self.prefixes + self.stops - self.starts

    @property
    def scored(self) -> np.ndarray:
        """Scored positions of each window: [W] int64."""
        return self.stops - self.scored_from

    def mean_context(self) -> float:
        """Mean number of tokens that the scored positions see, themselves included."""
        first = self.prefixes + self.scored_from - self.starts + 1
        contexts = (first + self.lengths) / 2  # of the scored positions of each window
        return float(np.average(contexts, weights=self.scored))


def cut_windows(
    lengths: Sequence[int],
    length: int,
    *,
    overlap: float = 0.5,
    stride: int | None = None,
    min_context: int = 1,
    begin: int = 0,
) -> Windows:
    """Slides a window over each document so that every position is scored exactly once.

    The first window of a document scores all of its positions. Each later window scores the
    next `(1 - overlap) * length` positions and takes as context what precedes them, so that they
    see between `overlap * length + 1` and `length` tokens; the last window of a document is moved
    back to full length. A document that is shorter than `length` is one window. Which positions
    are scored does not depend on `length`.

    Args:
        lengths: tokens of each document.
        length: most tokens in a window.
        overlap: fraction of a window that is only context, in [0, 1).
        stride: positions that a later window scores, in [1, length]; None for
            `(1 - overlap) * length`. With one that is the same at every length, and `min_context`
            above the longest length minus it, each scored position sees more than `length -
            stride` tokens at every length.
        min_context: score only positions that have at least this many tokens in their document
            up to and including themselves.
        begin: Begin tokens to put before each window that does not begin where its document does.
            They count as tokens of the window. `length` is above it.
    """
    room = length - begin  # of a later window, for the document
    stride = max(1, round(length * (1.0 - overlap))) if stride is None else stride
    stride = max(1, min(stride, room))
    positions = np.maximum(np.asarray(lengths, dtype=np.int64) - 1, 0)
    counts = np.where(positions > 0, 1 - (-np.maximum(positions - length, 0) // stride), 0)
    documents = np.repeat(np.arange(len(positions)), counts)
    index = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    stops = np.minimum(length + index * stride, positions[documents])
    scored_from = np.where(index == 0, 0, length + (index - 1) * stride)
    scored_from = np.maximum(scored_from, min_context - 1)
    kept = scored_from < stops
    starts = np.where(index == 0, 0, stops - room)
    starts = np.where(starts <= begin, 0, starts)  # the document's own begin is in the room
    prefixes = np.where(starts > 0, begin, 0)
    return Windows(documents[kept], starts[kept], scored_from[kept], stops[kept], prefixes[kept])
