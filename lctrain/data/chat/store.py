"""ChatStore: token ids of conversations, with the tokens that have a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lctrain.batch import IGNORE_INDEX
from lctrain.data.documents import TokenStore
from lctrain.data.faults import warn_first_rank
from lctrain.pluralize import pluralize

if TYPE_CHECKING:
    from datasets import Dataset

_SHOWN = 5


class ChatStore:
    """Tokens and labels of N conversations in an Arrow cache file; has the methods of TokenStore.

    Conversations that could not be rendered are left out.

    Attributes:
        lengths: [N] int64, number of tokens of each conversation.
        names: [N] names of the conversations.
        trained_tokens: [N] int64, number of tokens of each conversation that the loss counts:
            tokens with a label, except a conversation's first token, which no token predicts.
        special_texts: Number of times that a message holds the text of a special token.
        faults: Messages for the conversations that were left out, with file and line.
        lost: Names of message parts that the chat template did not write into the text, with file
            and line.
        has_labels: Always true: `labels` returns the labels of tokens.
    """

    has_labels = True

    def __init__(self, dataset: Dataset, names: Sequence[str], on_error: str = "skip") -> None:
        """Wraps a dataset of tokenized conversations, one row per name.

        Args:
            dataset: The tokenized conversations.
            names: Names of the conversations.
            on_error: "raise" stops at a conversation that keeps no trained token in a row; "skip"
                leaves it out.
        """
        self._dataset, self._names, self._on_error = dataset, names, on_error
        self._all = TokenStore(dataset, names)
        self._rows = np.flatnonzero(self._all.lengths > 0)
        self.lengths = self._all.lengths[self._rows]
        self.names: Sequence[str] = [names[row] for row in self._rows]
        self.special_texts = self._all.special_texts
        flat = dataset.data.column("spans").to_numpy() if len(dataset) else []
        self._spans = [np.asarray(flat[row], np.int64).reshape(-1, 2) for row in self._rows]
        self.trained_tokens = np.array(
            [int((s[:, 1] - np.maximum(s[:, 0], 1)).sum()) for s in self._spans], dtype=np.int64
        )
        self.faults, self.lost = self._texts("fault"), self._texts("lost")

    def _texts(self, column: str) -> list[str]:
        """Returns the texts of a column, each after the name of its conversation."""
        texts = self._dataset.data.column(column).to_pylist() if len(self._dataset) else []
        pairs = zip(self._names, texts, strict=False)
        return [f"{name}: {text}" for name, text in pairs if text is not None]

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatStore, (self._dataset, self._names, self._on_error)

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Returns tokens [start, start + length) of a conversation: [length] int32, read-only."""
        return self._all.tokens(int(self._rows[document]), start, length)

    def labels(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Returns the labels of tokens [start, start + length) of a conversation: [length] int32.

        A label is the token itself, or -100 for a token that is not trained on.
        """
        tokens = self.tokens(document, start, length)
        labels = np.full_like(tokens, IGNORE_INDEX)
        for begin, end in np.clip(self._spans[document] - start, 0, len(tokens)).tolist():
            labels[begin:end] = tokens[begin:end]
        return labels

    def count_trained(
        self, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        """Returns the number of trained tokens in pieces of conversations: [P] int64.

        The first token of a piece does not count, since no token predicts it.

        Args:
            documents: [P] integers, the conversation of each piece.
            starts: [P] integers, first token of each piece.
            lengths: [P] integers, number of tokens of each piece.

        Raises:
            ValueError: with on_error="raise", if the pieces of a conversation have none.
        """
        found = self.trained_tokens[documents]
        for piece in np.flatnonzero(lengths < self.lengths[documents]):
            first, stop = int(starts[piece]) + 1, int(starts[piece] + lengths[piece])
            spans = np.clip(self._spans[documents[piece]], first, stop)
            found[piece] = (spans[:, 1] - spans[:, 0]).sum()
        if self._on_error == "raise":
            self._require_trained(documents, found)
        return found

    def _require_trained(self, documents: np.ndarray, trained: np.ndarray) -> None:
        sums = np.bincount(documents, trained, minlength=len(self))
        empty = [document for document in np.unique(documents) if sums[document] == 0]
        if empty:
            raise ValueError(
                f"{self.names[empty[0]]}: a conversation must have a token to train on in its row, "
                "got none: its prompt alone fills the row. Raise data.max_tokens, leave it out, "
                "or use data.on_error=skip."
            )

    def report(self, on_error: str, may_be_empty: bool = False) -> None:
        """Warns about conversations that were left out, or whose template left out a part.

        Args:
            on_error: "skip" warns; "raise" raises ValueError at the first fault.
            may_be_empty: Whether the function only warns if every conversation was left out.

        Raises:
            ValueError: with on_error="raise", if a conversation was left out; if all were.
        """
        count = len(self.faults)
        if count and on_error == "raise":
            raise ValueError(self.faults[0])
        if count and not len(self) and not may_be_empty:
            more = f" The data hold {pluralize(count - 1, 'more fault')}." if count > 1 else ""
            raise ValueError(f"{self.faults[0]} Nothing else could be used.{more}")
        if count:
            warn_first_rank(
                f"{count:,} of {pluralize(count + len(self), 'conversation')} could not be used "
                f"(data.on_error=raise stops at the first):{_listed(self.faults)}"
            )
        if self.lost:
            warn_first_rank(
                f"The chat template leaves out parts of {len(self.lost):,} of "
                f"{pluralize(len(self), 'conversation')}. To train on them, name another template "
                "as data.chat_template:"
                f"{_listed(self.lost)}"
            )


def _listed(lines: list[str]) -> str:
    """Returns the first lines as a bulleted list, and how many more there are."""
    rest = f"\n  and {len(lines) - _SHOWN:,} more" if len(lines) > _SHOWN else ""
    return "\n  " + "\n  ".join(lines[:_SHOWN]) + rest
