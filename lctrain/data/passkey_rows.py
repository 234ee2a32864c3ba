"""Adds passkey documents to training rows: the same number of tokens to every row.

Every row gets the fraction, not only the average row. Packing sorts documents by length, so passkey
documents that are packed like other documents would fill some rows and be absent from most. The
text of a passkey document depends only on the document's number, so a resumed run or another worker
process generates the same document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lctrain.data.documents import StoredTokens
from lctrain.data.packing import PackingPlan
from lctrain.data.passkey import KEY_WORDS, Filler, PasskeyFormat

SHORTEST = 64  # tokens; in a shorter document the key is only a few lines before the question
AT_ENDS = 0.1  # share of keys at the very beginning of the text, and as many right at its end
LONGEST_KEY = 128  # words; with a long key, more of a document's tokens teach retrieval
_LENGTHS, _DOCUMENTS = 1, 2  # purposes of random streams: lengths, and texts
_TRAINING = 1  # separates these seeds from others: NumPy pads seeds, so [2, n] equals [2, n, 0]


def _stream(purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([purpose, number], spawn_key=(_TRAINING,)))


def passkey_lengths(
    rows: int, tokens: int, shortest: int, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the lengths of the passkey documents in every row from a log-uniform distribution.

    Short documents let a model learn to copy the key over short distances first.

    Args:
        rows: Number of rows, R.
        tokens: Tokens of passkey documents in each row, at least `shortest`.
        shortest: Length of the shortest document in tokens.
        longest: Length of the longest document in tokens.

    Returns:
        The lengths, [K] int64, and row_offsets, [R + 1] int64: row r contains the documents
        row_offsets[r] to row_offsets[r + 1] - 1.
    """
    lengths: list[int] = []
    row_offsets = [0]
    for row in range(rows):
        random = _stream(_LENGTHS, row)
        room = tokens
        while room >= shortest:
            drawn = shortest * (longest / shortest) ** random.random()
            length = min(round(drawn), room)
            if room - length < shortest:  # the remaining tokens are too few for another document
                length = min(room, longest)
            lengths.append(length)
            room -= length
        row_offsets.append(len(lengths))
    return np.array(lengths, dtype=np.int64), np.array(row_offsets, dtype=np.int64)


def add_passkeys(
    plan: PackingPlan, documents: int, lengths: np.ndarray, row_offsets: np.ndarray, max_tokens: int
) -> PackingPlan:
    """Returns a packing plan whose rows also contain passkey documents.

    Args:
        plan: Packing plan of the text documents. Its R rows leave room for the passkey documents.
        documents: Number of text documents. The passkey documents are numbered from here on.
        lengths: [K] int64, number of tokens of each passkey document.
        row_offsets: [R + 1] int64; row r receives the passkey documents row_offsets[r] to
            row_offsets[r + 1] - 1.
        max_tokens: Capacity of a row in tokens, passkey documents included.
    """
    pieces, added = len(plan.lengths), np.arange(len(lengths))
    # The passkey documents of row r are inserted after the text pieces of row r.
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
    """Tokens of K passkey documents, which are generated on access; used like a TokenStore.

    Attributes:
        lengths: [K] int64, number of tokens of each document.
        names: [K] names of the documents.
    """

    def __init__(self, format: PasskeyFormat, lengths: np.ndarray, text: StoredTokens) -> None:
        """Sets the documents' lengths and the text that keys are hidden in.

        A share AT_ENDS of the keys stands at the very beginning of the text, and as many at its
        end; the depth of the others is drawn uniformly. The number of words is drawn log-uniformly
        between KEY_WORDS, which the evaluation uses, and LONGEST_KEY.

        Args:
            format: Fixed texts and words of the documents.
            lengths: [K] int64, number of tokens of each document.
            text: Tokens of the text documents that serve as filler.
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
        depth = min(max((random.random() - AT_ENDS) / (1 - 2 * AT_ENDS), 0.0), 1.0)
        whole = self._format.make(
            random, tokens, depth, self._filler, with_end=True, key_words=key_words
        ).input_ids
        return whole[start : None if length is None else start + length]


class JoinedStore:
    """Concatenation of two stores of N and K documents; used like a TokenStore.

    Attributes:
        lengths: [N + K] int64, number of tokens of each document.
        names: [N + K] names of the documents.
    """

    def __init__(self, first: StoredTokens, second: StoredTokens) -> None:
        """Concatenates the stores: the documents of `second` follow those of `first`."""
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
