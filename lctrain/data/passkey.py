"""Passkey documents: a key in the middle of other text, and a question for it at the end.

Training and evaluation use the same ones. A document is put together from token ids, never from a
string that is tokenized as a whole: where the answer lies does not depend on how a tokenizer merges
neighbours. The key is five different digits, each with a space before it, so that with a usual
tokenizer each is one token that nothing merges with; what precedes the answer is word for word what
precedes the key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATEMENT = "\n# The pass key is"
REMINDER = ". Remember it.\n"
QUESTION = "\n# What is the pass key?\n# The pass key is"
DIGITS = tuple(f" {digit}" for digit in range(10))
KEY_DIGITS = 5


@dataclass(frozen=True, eq=False)
class Passkey:
    """One document with a key.

    Attributes:
        input_ids: [n] int64; without an end token it ends with the answer.
        answer_start: Where the answer begins in `input_ids`.
        answer_tokens: Its length.
        digits: The key.
    """

    input_ids: np.ndarray
    answer_start: int
    answer_tokens: int
    digits: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PasskeyFormat:
    """The fixed parts of a passkey document as token ids, [n] int64 each.

    Attributes:
        begin: What the tokenizer puts before every document.
        statement: What precedes the key.
        reminder: What follows it.
        question: What precedes the answer.
        digits: The ten digits that keys are made of.
        end: The end token.
    """

    begin: np.ndarray
    statement: np.ndarray
    reminder: np.ndarray
    question: np.ndarray
    digits: tuple[np.ndarray, ...]
    end: np.ndarray

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> PasskeyFormat:
        """Tokenizes the parts, each by itself.

        Raises:
            ValueError: if the tokenizer has no tokens for a part.
        """

        def ids(text: str) -> np.ndarray:
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not tokens or (tokenizer.unk_token_id is not None and _unknown(tokenizer, tokens)):
                raise ValueError(
                    f"tokenizer must have tokens for {text!r}, got none. Passkeys need one that "
                    "knows digits and English; leave them out with this one."
                )
            return np.array(tokens, dtype=np.int64)

        plain = ids(STATEMENT).tolist()
        whole = list(tokenizer(STATEMENT)["input_ids"])
        begin = whole[: whole.index(plain[0])] if plain[0] in whole else []
        return cls(
            begin=np.array(begin, dtype=np.int64),
            statement=ids(STATEMENT),
            reminder=ids(REMINDER),
            question=ids(QUESTION),
            digits=tuple(ids(digit) for digit in DIGITS),
            end=np.array([tokenizer.eos_token_id], dtype=np.int64),
        )

    @property
    def shortest(self) -> int:
        """Tokens of the longest document without filler, the end token included."""
        fixed = (self.begin, self.statement, self.reminder, self.question, self.end)
        key = sum(sorted(map(len, self.digits))[-KEY_DIGITS:])
        return sum(map(len, fixed)) + 2 * key

    def make(
        self,
        random: np.random.Generator,
        tokens: int,
        depth: float,
        filler: Filler,
        *,
        with_end: bool,
    ) -> Passkey:
        """Makes a document with a new key.

        Args:
            random: Chooses key and filler, in this order; not the same at two depths only if the
                caller's generator is not.
            tokens: Of the document, exactly; at least `shortest`.
            depth: Share of the filler that precedes the key, in [0, 1].
            filler: Where the other text comes from.
            with_end: Close the document with the end token.
        """
        chosen = random.permutation(len(self.digits))[:KEY_DIGITS]
        key = np.concatenate([self.digits[digit] for digit in chosen])
        end = self.end if with_end else self.end[:0]
        parts = [self.begin, self.statement, key, self.reminder, self.question, key, end]
        text = filler.take(random, tokens - sum(map(len, parts)))
        place = round(depth * len(text))
        before = [self.begin, text[:place], self.statement, key, self.reminder]
        ids = np.concatenate([*before, text[place:], self.question, key, end])
        start = len(ids) - len(end) - len(key)
        return Passkey(ids, start, len(key), tuple(chosen.tolist()))


def _unknown(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> bool:
    return all(token == tokenizer.unk_token_id for token in tokens)


class Filler:
    """Text to hide a key in: documents one after another, from a random token on."""

    def __init__(
        self,
        lengths: np.ndarray,
        read: Callable[[int, int, int], np.ndarray],
        begin: int = 0,
    ) -> None:
        """Wraps tokenized documents; the last token of each, its end token, is left out.

        Args:
            lengths: [N] tokens of each document.
            read: (document, start, length) -> [length] token ids.
            begin: Tokens at the start of each document that are left out.

        Raises:
            ValueError: if nothing is left.
        """
        usable = np.maximum(np.asarray(lengths, dtype=np.int64) - 1 - begin, 0)
        self._ends = np.cumsum(usable)
        self._begin = begin
        self._read = read
        if len(usable) == 0 or self._ends[-1] == 0:
            raise ValueError(
                f"passkeys must be hidden in text, got {len(usable)} documents without a token. "
                "Use more data."
            )

    @classmethod
    def of(cls, documents: Sequence[np.ndarray], begin: int = 0) -> Filler:
        """Of token ids in memory, [n] integers each."""
        lengths = np.array([len(document) for document in documents])
        return cls(
            lengths, lambda index, start, count: documents[index][start : start + count], begin
        )

    def take(self, random: np.random.Generator, tokens: int) -> np.ndarray:
        """Returns `tokens` consecutive tokens, [tokens] int64; after the last comes the first."""
        place = int(random.integers(self._ends[-1]))
        parts = [np.empty(0, dtype=np.int64)]
        while tokens > 0:
            document = int(np.searchsorted(self._ends, place, side="right"))
            first = int(self._ends[document - 1]) if document else 0
            count = min(tokens, int(self._ends[document]) - place)
            parts.append(self._read(document, self._begin + place - first, count))
            tokens -= count
            place = (place + count) % int(self._ends[-1])
        return np.concatenate(parts).astype(np.int64)
