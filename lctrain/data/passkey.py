"""Passkey documents: a key in the middle of other text, and a question for it at the end.

Training and evaluation use the same ones. A document is put together from token ids, never from a
string that is tokenized as a whole: where the answer lies does not depend on how a tokenizer merges
neighbours. The key is different words of the tokenizer's own vocabulary in random order, each one
token. There are many of them, so that a model which cannot look the key up pays dearly for it: from
keys of digits, small models learn to guess among ten before they learn to look. What precedes the
answer is word for word what precedes the key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lctrain.data.tokenizer import tokens_around

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATEMENT = "\n# The pass key is"
REMINDER = ". Remember it.\n"
QUESTION = "\n# What is the pass key?\n# The pass key is"
DIGITS = tuple(f" {digit}" for digit in range(10))
KEY_WORDS = 4
MOST_WORDS = 1024
_COMMON_WORDS = 4096  # the first of the vocabulary
_FEWEST_WORDS = 64
_WHOLE_WORD = re.compile(r"[Ġ▁][a-z]{3,}")  # a letter of GPT-2 or SentencePiece stands for a space


@dataclass(frozen=True, eq=False)
class Passkey:
    """One document with a key.

    Attributes:
        input_ids: [n] int64; without an end token it ends with the answer.
        answer_start: Position of the answer's first token in `input_ids`.
        answer_tokens: Its length.
        key: Its words, as numbers of `PasskeyFormat.words`.
    """

    input_ids: np.ndarray
    answer_start: int
    answer_tokens: int
    key: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PasskeyFormat:
    """The fixed parts of a passkey document as token ids, [n] int64 each.

    Attributes:
        begin: Tokens that the tokenizer adds before every document.
        statement: Tokens before the key.
        reminder: Tokens after the key.
        question: Tokens before the answer.
        words: Token ids of the words from which keys are made.
        end: The end token; none if the tokenizer has none.
    """

    begin: np.ndarray
    statement: np.ndarray
    reminder: np.ndarray
    question: np.ndarray
    words: tuple[np.ndarray, ...]
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

        begin, _ = tokens_around(tokenizer)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return cls(
            begin=np.array(begin, dtype=np.int64),
            statement=ids(STATEMENT),
            reminder=ids(REMINDER),
            question=ids(QUESTION),
            words=_words(tokenizer) or tuple(ids(digit) for digit in DIGITS),
            end=np.array(end, dtype=np.int64),
        )

    @property
    def shortest(self) -> int:
        """Tokens of the longest document without filler, the end token included."""
        return self._fixed + 2 * KEY_WORDS * self._longest_word

    @property
    def _fixed(self) -> int:
        """Tokens of a document without key and filler, the end token included."""
        fixed = (self.begin, self.statement, self.reminder, self.question, self.end)
        return sum(map(len, fixed))

    @property
    def _longest_word(self) -> int:
        return max(map(len, self.words))

    def most_words(self, tokens: int) -> int:
        """Words of a key that leave twice its own length to the filler."""
        room = (tokens - self._fixed) // (4 * self._longest_word)
        return max(KEY_WORDS, min(room, len(self.words)))

    def make(
        self,
        random: np.random.Generator,
        tokens: int,
        depth: float,
        filler: Filler,
        *,
        with_end: bool,
        key_words: int = KEY_WORDS,
    ) -> Passkey:
        """Makes a document with a new key.

        Args:
            random: Chooses key and filler, in this order; in the same state it chooses the same at
                every depth.
            tokens: Length of the document in tokens, at least `shortest`.
            depth: Fraction of the filler before the key, in [0, 1].
            filler: Source of the filler text.
            with_end: Close the document with the end token.
            key_words: Words of the key.
        """
        chosen = random.permutation(len(self.words))[:key_words]
        key = np.concatenate([self.words[word] for word in chosen])
        end = self.end if with_end else self.end[:0]
        parts = [self.begin, self.statement, key, self.reminder, self.question, key, end]
        text = filler.take(random, tokens - sum(map(len, parts)))
        place = round(depth * len(text))
        before = [self.begin, text[:place], self.statement, key, self.reminder]
        ids = np.concatenate([*before, text[place:], self.question, key, end])
        start = len(ids) - len(end) - len(key)
        return Passkey(ids, start, len(key), tuple(chosen.tolist()))


def _words(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, ...]:
    """Words that are one token each, in the order of their tokens; none if there are few.

    Of the common ones those that are least so: others would occur all over the text.
    """
    found = []
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if not _WHOLE_WORD.fullmatch(token):
            continue
        if tokenizer(" " + token[1:], add_special_tokens=False)["input_ids"] == [index]:
            found.append(np.array([index], dtype=np.int64))
        if len(found) == _COMMON_WORDS:
            break
    return tuple(found[-MOST_WORDS:]) if len(found) >= _FEWEST_WORDS else ()


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
            ValueError: if no tokens remain.
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
        """Builds a filler from token ids in memory, [n] integers each."""
        lengths = np.array([len(document) for document in documents])
        return cls(
            lengths, lambda index, start, count: documents[index][start : start + count], begin
        )

    def take(self, random: np.random.Generator, tokens: int) -> np.ndarray:
        """Returns `tokens` consecutive tokens, [tokens] int64.

        It starts again after the last one.
        """
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
