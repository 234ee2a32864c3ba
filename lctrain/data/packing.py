"""Packs documents into rows of at most max_tokens. Only the documents' lengths decide.

The algorithm is best-fit decreasing within a window of documents (`packing_window`). A document
longer than the limit is first split into pieces. Pieces are taken longest first, and each goes into
the fullest row that has room for it. Rows are grouped by their number of free tokens, and all
pieces of one length are placed together, so the time does not depend on the number of open rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from tqdm import tqdm

from lctrain.batch_input import check_max_tokens
from lctrain.pluralize import pluralize

Overlong = Literal["split", "truncate", "drop"]

CountTrained = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

_WORD_BITS = 1024
BAR_DELAY_S = 1.0  # seconds before a progress bar appears


@dataclass(frozen=True)
class SourceCounts:
    """Counts of one source of a mix in the training rows.

    Attributes:
        name: Name of the source.
        documents: Documents of the source, counted as often as a pass reads them.
        tokens: Tokens of the source.
        fill: Fraction of the rows' capacity that holds tokens of the source.
        repeats: Times that a pass over the rows reads the source.
        trained_tokens: Tokens of the source that are trained on, if only some are; None for all.
    """

    name: str
    documents: int
    tokens: int
    fill: float
    repeats: float
    trained_tokens: int | None = None

    def __str__(self) -> str:
        trained = ""
        if self.trained_tokens is not None:
            trained = f", {self.trained_tokens:,} of them to train on"
        return (
            f"{self.name}: {pluralize(self.tokens, 'token')} of "
            f"{pluralize(self.documents, 'document')}{trained}, "
            f"fill {self.fill:.4f}, read {self.repeats:.2f} times"
        )


@dataclass(frozen=True)
class PackingReport:
    """Counts of the documents and tokens in packed rows, and of those that were left out.

    Attributes:
        rows: Number of rows.
        max_tokens: Capacity of a row in tokens.
        documents: Documents that are in the rows, whole or in part, passkey documents included.
        pieces: Pieces in the rows. A document is one piece unless it was split.
        tokens: Tokens in the rows.
        split: Documents that were split because they are longer than max_document_tokens.
        truncated: Documents that were truncated because they are longer than max_document_tokens.
        truncated_tokens: Tokens that truncation removed.
        dropped: Documents that were dropped because they are longer than max_document_tokens.
        dropped_tokens: Tokens of the dropped documents.
        dropped_empty: Documents that were left out because they hold no text.
        dropped_unreadable: Documents, lines and files that could not be read.
        repaired: Documents that were read in part, or with characters replaced.
        special_texts: Number of times that a document holds the text of a special token.
        passkeys: Passkey documents, which are generated to teach retrieval.
        passkey_tokens: Tokens of the passkey documents.
        untrained: Pieces of overlong conversations that were left out, since none of their tokens
            is trained on.
        trained_tokens: Tokens that are trained on, if only some are; None for all.
        sources: Counts of every source of a mix; empty for a single source.
    """

    rows: int
    max_tokens: int
    documents: int
    pieces: int
    tokens: int
    split: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    dropped: int = 0
    dropped_tokens: int = 0
    dropped_empty: int = 0
    dropped_unreadable: int = 0
    repaired: int = 0
    special_texts: int = 0
    passkeys: int = 0
    passkey_tokens: int = 0
    untrained: int = 0
    trained_tokens: int | None = None
    sources: tuple[SourceCounts, ...] = ()

    @property
    def fill(self) -> float:
        """Fraction of the rows' capacity that holds tokens, in [0, 1]."""
        return self.tokens / (self.rows * self.max_tokens) if self.rows else 0.0

    def __str__(self) -> str:
        return (
            f"{pluralize(self.rows, 'row')} of {self.max_tokens:,}: "
            f"{pluralize(self.tokens, 'token')} of "
            f"{pluralize(self.documents, 'document')}, fill {self.fill:.4f}; {self.split:,} split, "
            f"{self.truncated:,} truncated{_lost(self.truncated_tokens)}, "
            f"{self.dropped:,} dropped{_lost(self.dropped_tokens)}, "
            f"{self.dropped_empty:,} empty, {self.dropped_unreadable:,} unreadable"
            f"{f', {self.repaired:,} repaired' if self.repaired else ''}"
            f"{f', {self.special_texts:,} texts of special tokens' if self.special_texts else ''}"
            f"{self._passkeys()}{self._trained()}"
            f"{''.join(f'; {source}' for source in self.sources)}"
        )

    def _passkeys(self) -> str:
        if not self.passkeys:
            return ""
        return f"; {self.passkeys:,} with a passkey ({pluralize(self.passkey_tokens, 'token')})"

    def _trained(self) -> str:
        if self.trained_tokens is None:
            return ""
        lost = (
            f", {pluralize(self.untrained, 'piece')} without one left out" if self.untrained else ""
        )
        return f"; {pluralize(self.trained_tokens, 'token')} to train on{lost}"


def combine_reports(reports: Sequence[PackingReport]) -> PackingReport:
    """Returns the sums of the counts of several sets of rows, all of the same capacity.

    Args:
        reports: At least one report. The counts of sources are left out.
    """
    if len(reports) == 1:
        return reports[0]
    names = [name for name, value in vars(reports[0]).items() if isinstance(value, int)]
    sums = {name: sum(getattr(report, name) for report in reports) for name in names}
    trained = None
    if any(report.trained_tokens is not None for report in reports):
        counts = [(report.trained_tokens, report.tokens) for report in reports]
        trained = sum(whole if part is None else part for part, whole in counts)
    fixed: dict[str, Any] = {"max_tokens": reports[0].max_tokens, "trained_tokens": trained}
    return PackingReport(**(sums | fixed))


def _lost(tokens: int) -> str:
    return f" ({pluralize(tokens, 'token')} lost)" if tokens else ""


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """Assignment of P pieces of documents to R rows.

    The index of a piece is its document id, which keys the attention dropout mask. It depends on
    the documents, max_tokens, max_document_tokens and overlong, but not on the window, the shuffle
    or the number of ranks.

    Attributes:
        documents: [P] int64, number of the document that a piece belongs to, in rising order.
        starts: [P] int64, position of a piece's first token in its document.
        lengths: [P] int64, number of tokens of a piece.
        row_offsets: [R + 1] int64; row r holds row_pieces[row_offsets[r]:row_offsets[r + 1]].
        row_pieces: [P] int64, indices of the pieces, ordered by row. Within a row the longest piece
            comes first, and passkey documents come last.
        report: Counts of the packing.
    """

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    row_offsets: np.ndarray
    row_pieces: np.ndarray
    report: PackingReport

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def row(self, index: int) -> np.ndarray:
        """Returns the indices of the pieces in one row: [n] int64."""
        return self.row_pieces[self.row_offsets[index] : self.row_offsets[index + 1]]

    def costs(self) -> np.ndarray:
        """Returns the attention work of every row: [R] float64 sums of squared piece lengths."""
        squares = self.lengths[self.row_pieces].astype(np.float64) ** 2
        return np.add.reduceat(squares, self.row_offsets[:-1]) if len(self) else squares


def plan_rows(
    lengths: np.ndarray,
    max_tokens: int,
    *,
    max_document_tokens: int | None = None,
    overlong: Overlong = "split",
    window: int = 100_000,
    dropped_empty: int = 0,
    dropped_unreadable: int = 0,
    progress: bool = False,
    count_trained: CountTrained | None = None,
) -> PackingPlan:
    """Packs documents into rows of at most `max_tokens`.

    Args:
        lengths: [N] integers, number of tokens of each document, all >= 1.
        max_tokens: Capacity of a row in tokens, >= 2.
        max_document_tokens: Longest document in a row, in tokens, in [2, max_tokens]; None for
            max_tokens.
        overlong: Treatment of a document longer than max_document_tokens: "split" it into pieces of
            this length and a shorter last one, "truncate" it to its first tokens, or "drop" it.
        window: Number of documents that are packed together; a row holds documents of one window.
        dropped_empty: Number of empty documents that were left out before, for the report.
        dropped_unreadable: Number of unreadable documents that were left out before, for the
            report.
        progress: Whether to show a progress bar if packing takes more than a second.
        count_trained: Function (documents, first tokens, lengths of P pieces, [P] int64 each) ->
            number of trained tokens of each piece, [P] int64. Pieces with none are left out. None
            trains on every token.

    Returns:
        The plan. Its attribute `report` holds the counts.

    Raises:
        TypeError: if the lengths are no integers.
        ValueError: if an argument is out of range.
    """
    check_max_tokens(max_tokens)
    limit = document_limit(max_document_tokens, max_tokens)
    if overlong not in get_args(Overlong):
        raise ValueError(
            f"overlong must be one of {', '.join(get_args(Overlong))}, got {overlong!r}. "
            "split loses no token."
        )
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}. Use the default, 100000.")
    lengths = _integers(lengths)
    if len(lengths) and lengths.min() < 1:
        raise ValueError("lengths must be at least 1, got a smaller one. Drop empty documents.")

    documents, starts, pieces = _cut(lengths, limit, overlong)
    trained_tokens, untrained = None, 0
    if count_trained is not None:
        trained = count_trained(documents, starts, pieces)
        trained_tokens, untrained = int(trained.sum()), int((trained == 0).sum())
        documents, starts, pieces = (part[trained > 0] for part in (documents, starts, pieces))
    row_of_piece = np.empty(len(pieces), dtype=np.int64)
    rows = 0
    ends = np.searchsorted(documents, np.arange(window, len(lengths) + window, window))
    begin = 0
    with tqdm(
        total=len(pieces),
        desc="Packing",
        unit="piece",
        unit_scale=True,
        delay=BAR_DELAY_S,
        disable=not progress,
    ) as bar:
        for end in ends.tolist():
            part = slice(begin, end)
            rows += _best_fit_decreasing(pieces[part], max_tokens, row_of_piece[part], rows)
            bar.update(end - begin)
            begin = end
    # ordered by row, and longest first within a row
    row_pieces = np.lexsort((-pieces, row_of_piece))
    row_offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of_piece, minlength=rows))])

    excess = lengths > limit
    over, over_tokens = int(excess.sum()), int(lengths[excess].sum())
    report = PackingReport(
        rows=rows,
        max_tokens=max_tokens,
        documents=len(np.unique(documents)),
        pieces=len(pieces),
        tokens=int(pieces.sum()),
        split=over if overlong == "split" else 0,
        truncated=over if overlong == "truncate" else 0,
        truncated_tokens=over_tokens - over * limit if overlong == "truncate" else 0,
        dropped=over if overlong == "drop" else 0,
        dropped_tokens=over_tokens if overlong == "drop" else 0,
        dropped_empty=dropped_empty,
        dropped_unreadable=dropped_unreadable,
        untrained=untrained,
        trained_tokens=trained_tokens,
    )
    return PackingPlan(documents, starts, pieces, row_offsets, row_pieces, report)


def document_limit(max_document_tokens: int | None, max_tokens: int) -> int:
    """Returns the longest document in a row, in tokens: max_document_tokens, or max_tokens if None.

    Raises:
        ValueError: if max_document_tokens is below 2 or above max_tokens.
    """
    if max_document_tokens is None:
        return max_tokens
    if not 2 <= max_document_tokens <= max_tokens:
        raise ValueError(
            f"max_document_tokens must be in [2, max_tokens = {max_tokens}], got "
            f"{max_document_tokens}. Use null for documents as long as a row."
        )
    return max_document_tokens


def _integers(lengths: np.ndarray) -> np.ndarray:
    """Returns lengths as int64; raises a TypeError for other numbers, such as those of a mask."""
    given = np.asarray(lengths)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise TypeError(
            f"lengths must be integers [documents], got {given.dtype} of shape {given.shape}. Pass "
            "numbers of tokens."
        )
    return given.astype(np.int64)


def _cut(
    lengths: np.ndarray, limit: int, overlong: Overlong
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts documents into pieces of at most `limit` tokens.

    Returns:
        The document, the first token and the length of every piece: [P] int64 each.
    """
    documents = np.arange(len(lengths))
    if overlong == "drop":
        documents = documents[lengths <= limit]
    if overlong != "split":
        kept = np.minimum(lengths[documents], limit)
        return documents, np.zeros_like(documents), kept
    counts = -(-lengths // limit)
    firsts = np.cumsum(counts) - counts
    documents = np.repeat(documents, counts)
    starts = (np.arange(len(documents)) - np.repeat(firsts, counts)) * limit
    return documents, starts, np.minimum(lengths[documents] - starts, limit)


def _best_fit_decreasing(
    lengths: np.ndarray, capacity: int, row_of_piece: np.ndarray, first_row: int
) -> int:
    """Packs the pieces of one window, and returns the number of rows that it opened.

    Args:
        lengths: [P] int64, number of tokens of each piece.
        capacity: Capacity of a row in tokens.
        row_of_piece: [P] int64; the row of every piece is written into it.
        first_row: Number of the first row to open.
    """
    order = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    rows_by_room: dict[int, list[int]] = {}
    rooms = _SortedRooms(capacity)
    assigned: list[int] = []  # row of each piece, in falling order of length
    next_row = first_row

    def put_back(room: int, rows: list[int]) -> None:
        if room == 0:
            return
        if room in rows_by_room:
            rows_by_room[room].extend(rows)
        else:
            rows_by_room[room] = rows
            rooms.add(room)

    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            room = rooms.smallest_from(length)
            if room is None:  # open as many rows as the rest of this length needs
                room = capacity
                needed = -(-count // (capacity // length))
                candidates = list(range(next_row, next_row + needed))
                next_row += needed
            else:
                candidates = rows_by_room.pop(room)
                rooms.remove(room)
            # Pieces fill one row until no other piece fits; then they fill the next row.
            per_row = room // length
            full = min(len(candidates), count // per_row)
            filled, others = candidates[:full], candidates[full:]
            if per_row == 1:
                assigned.extend(filled)
            else:
                for row in filled:
                    assigned.extend([row] * per_row)
            if filled:
                put_back(room - per_row * length, filled)
            count -= full * per_row
            if count and others:  # fewer pieces left than the next row could take
                row = others.pop()
                assigned.extend([row] * count)
                put_back(room - count * length, [row])
                count = 0
            if others:
                put_back(room, others)
    row_of_piece[order] = assigned
    return next_row - first_row


class _SortedRooms:
    """A set of integers in [0, largest] that finds its smallest member >= x in constant time."""

    def __init__(self, largest: int) -> None:
        self._words = [0] * (largest // _WORD_BITS + 1)
        self._occupied = 0  # bit w is set if word w of the bit set is not 0

    def add(self, value: int) -> None:
        word, bit = divmod(value, _WORD_BITS)
        self._words[word] |= 1 << bit
        self._occupied |= 1 << word

    def remove(self, value: int) -> None:
        word, bit = divmod(value, _WORD_BITS)
        self._words[word] &= ~(1 << bit)
        if not self._words[word]:
            self._occupied &= ~(1 << word)

    def smallest_from(self, value: int) -> int | None:
        word, bit = divmod(value, _WORD_BITS)
        rest = self._words[word] >> bit
        if rest:
            return value + _lowest_bit(rest)
        later = self._occupied >> (word + 1)
        if not later:
            return None
        word += 1 + _lowest_bit(later)
        return word * _WORD_BITS + _lowest_bit(self._words[word])


def _lowest_bit(value: int) -> int:
    return (value & -value).bit_length() - 1
