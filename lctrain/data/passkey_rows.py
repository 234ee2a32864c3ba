"""Training rows with a fixed fraction of passkey documents.

The share is of every row, not of the data as a whole: packing sorts by length, so mixed in like
other documents they would meet in some rows, and steps without any would follow steps of little
else. Everything about a passkey document is a function of its number, so that a resumed run, or
another worker, makes the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lctrain.data.documents import StoredTokens
from lctrain.data.packing import PackingPlan
from lctrain.data.passkey import KEY_WORDS, Filler, PasskeyFormat

SHORTEST = 64  # tokens; shorter ones would teach to look a few lines back only
LONGEST_KEY = 128  # words; a long key teaches the same in more of a document's tokens
_LENGTHS, _DOCUMENTS = 1, 2  # what a seed is for
_TRAINING = 1  # a branch of its own: NumPy pads seeds by zeros, so [2, n] is also [2, n, 0]


def _stream(purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([purpose, number], spawn_key=(_TRAINING,)))


def passkey_lengths(
    rows: int, tokens: int, shortest: int, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the lengths of each row's passkey documents, log-uniform.

    The short ones let a model learn to copy the key before it must do so from afar.

    Args:
        rows: Number of rows, R.
        tokens: Tokens of passkey documents in each row, at least `shortest`.
        shortest: Tokens of the shortest document.
        longest: Tokens of the longest document.

    Returns:
        lengths [K] int64 and row_offsets [R + 1] int64: row r has those from row_offsets[r] to
        row_offsets[r + 1].
    """
    lengths: list[int] = []
    row_offsets = [0]
    for row in range(rows):
        random = _stream(_LENGTHS, row)
        room = tokens
        while room >= shortest:
            drawn = shortest * (longest / shortest) ** random.random()
            length = min(round(drawn), room)
            if room - length < shortest:  # what is left is too short for another
                length = min(room, longest)
            lengths.append(length)
            room -= length
        row_offsets.append(len(lengths))
    return np.array(lengths, dtype=np.int64), np.array(row_offsets, dtype=np.int64)


def add_passkeys(
    plan: PackingPlan, documents: int, lengths: np.ndarray, row_offsets: np.ndarray, max_tokens: int
) -> PackingPlan:
    """Adds passkey documents to the rows of a plan.

    Args:
        plan: Packing plan of the text, whose rows have room for the passkeys; R rows.
        documents: Number of documents of the text; those with a passkey follow them.
        lengths: [K] int64, tokens of the passkey documents.
        row_offsets: [R + 1] int64, which of them belong to which row.
        max_tokens: Capacity of a row with both.
    """
    pieces, added = len(plan.lengths), np.arange(len(lengths))
    # the pieces of row r come before passkeys of row r, by inserting those behind each row's end
    ends = np.repeat(plan.row_offsets[1:], np.diff(row_offsets))
    report = replace(
        plan.report,
        max_tokens=max_tokens,
        documents=plan.report.documents + len(lengths),
        pieces=plan.report.pieces + len(lengths),
        tokens=plan.report.tokens + int(lengths.sum()),
        passkeys=len(lengths),
        passkey_tokens=int(lengths.sum()),
    )
    return PackingPlan(
        documents=np.concatenate([plan.documents, documents + added]),
        starts=np.concatenate([plan.starts, np.zeros_like(lengths)]),
        lengths=np.concatenate([plan.lengths, lengths]),
        row_offsets=plan.row_offsets + row_offsets,
        row_pieces=np.insert(plan.row_pieces, ends, pieces + added),
        report=report,
    )


class PasskeyStore:
    """Passkey documents that are generated on access; used like a TokenStore.

    Attributes:
        lengths: [K] int64, tokens of each document.
        names: Their names.
    """

    def __init__(self, format: PasskeyFormat, lengths: np.ndarray, text: StoredTokens) -> None:
        """Hides keys in `text`, at a depth that is uniform.

        Keys have a log-uniform number of words, from that of the evaluation to LONGEST_KEY.
        """
        self.lengths = lengths
        self.names: Sequence[str] = [f"passkey:{number}" for number in range(len(lengths))]
        self._format = format
        self._text = text
        self._filler = Filler(text.lengths, text.tokens, len(format.begin))

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Returns tokens [start, start + length) of a document: [length] int64."""
        random = _stream(_DOCUMENTS, document)
        tokens = int(self.lengths[document])
        most = min(self._format.most_words(tokens), LONGEST_KEY)
        key_words = round(KEY_WORDS * (most / KEY_WORDS) ** random.random())
        depth = float(random.random())
        whole = self._format.make(
            random, tokens, depth, self._filler, with_end=True, key_words=key_words
        ).input_ids
        return whole[start : None if length is None else start + length]


class JoinedStore:
    """Two stores, one after the other; see TokenStore.

    Attributes:
        lengths: [N + K] int64, tokens of each document.
        names: Their names.
    """

    def __init__(self, first: StoredTokens, second: StoredTokens) -> None:
        """Joins two stores."""
        self._first, self._second = first, second
        self.lengths = np.concatenate([first.lengths, second.lengths])
        self.names: Sequence[str] = [*first.names, *second.names]

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Returns tokens [start, start + length) of a document: [length] integers."""
        if document < len(self._first):
            return self._first.tokens(document, start, length)
        return self._second.tokens(document - len(self._first), start, length)
