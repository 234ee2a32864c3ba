"""Windows: parts of documents, cut so that every token is scored once with a bounded context.

Position p of a document holds token p and predicts token p + 1 from at most p + 1 tokens. A
document of n tokens therefore has n - 1 positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lctrain.instances import require_int, require_sequence


@dataclass(frozen=True, eq=False)
class Windows:
    """W windows of documents for a model to read, with the positions to score in each.

    Attributes:
        documents: [W] int64, index of the document of each window.
        starts: [W] int64, first position of the window.
        scored_from: [W] int64, first position that is scored. Earlier positions are context.
        stops: [W] int64, end of the window and of the scored positions, exclusive.
        prefixes: [W] int64, number of begin tokens that are put before the window.
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
        """Number of tokens in each window, begin tokens included: [W] int64."""
        return self.prefixes + self.stops - self.starts

    @property
    def scored(self) -> np.ndarray:
        """Number of scored positions in each window: [W] int64."""
        return self.stops - self.scored_from

    def chosen(self, indices: np.ndarray) -> Windows:
        """Returns the windows of the given indices, [n] int64."""
        fields = (self.documents, self.starts, self.scored_from, self.stops, self.prefixes)
        return Windows(*(values[indices] for values in fields))

    def mean_context(self) -> float:
        """Returns the mean number of tokens that a scored position sees, itself included."""
        first = self.prefixes + self.scored_from - self.starts + 1
        contexts = (first + self.lengths) / 2  # mean over the scored positions of each window
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
    """Slides a window over each document, so that every position is scored exactly once.

    The first window of a document scores all of its positions. Each later window scores the next
    `stride` positions; the positions before them in the window are their context. The scored
    positions of a later window thus see more than `length - stride` and at most `length` tokens.
    The last window of a document is moved back to full length. A document that is shorter than
    `length` is one window. The set of scored positions does not depend on `length`.

    Args:
        lengths: Number of tokens of each document.
        length: Largest number of tokens in a window.
        overlap: Fraction of a window that is context and not scored, in [0, 1).
        stride: Number of positions that a later window scores, in [1, length]; None for
            `(1 - overlap) * length`.
        min_context: Smallest number of tokens that a scored position sees in its document, itself
            included. If it is above the longest length minus `stride`, with the same stride at
            every length, each scored position sees more than `length - stride` tokens.
        begin: Number of begin tokens before each window that does not start at the beginning of its
            document. They count as tokens of the window. It must be below `length`.
    """
    require_sequence("lengths", lengths, "Pass the tokens of each document.")
    require_int("length", length, 1, "Pass the tokens of a window.")
    room = length - begin  # document tokens that fit into a later window
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
    starts = np.where(starts <= begin, 0, starts)  # the document's first tokens replace `begin`
    prefixes = np.where(starts > 0, begin, 0)
    return Windows(documents[kept], starts[kept], scored_from[kept], stops[kept], prefixes[kept])
