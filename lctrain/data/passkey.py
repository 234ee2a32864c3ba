"""Passkey documents: text with a key hidden in it, and a question for the key at the end.

Training and evaluation build documents with the same functions. A document is concatenated from
token ids and never tokenized as a whole, so the position of the answer does not depend on how the
tokenizer merges neighbouring characters. The key is a random sequence of different words, each one
token of the tokenizer's vocabulary. The words are drawn from many, so that guessing has a high
loss: with keys of digits, small models learn to guess one of ten digits before they learn to
retrieve the key. The words before the key and before the answer are the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lctrain.data.tokenizer import tokens_around
from lctrain.pluralize import pluralize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATEMENT = "\n# The pass key is"
REMINDER = ". Remember it.\n"
QUESTION = "\n# What is the pass key?\n# The pass key is"
DIGITS = tuple(f" {digit}" for digit in range(10))
KEY_WORDS = 4
MOST_WORDS = 1024
_COMMON_WORDS = 4096  # number of words, from the beginning of the vocabulary, that are considered
_FEWEST_WORDS = 64
_WHOLE_WORD = re.compile(r"[Ġ▁][a-z]{3,}")  # Ġ (GPT-2) and ▁ (SentencePiece) stand for a space


@dataclass(frozen=True, eq=False)
class Passkey:
    """A passkey document: its token ids, and the position of the answer.

    Attributes:
        input_ids: [n] int64 token ids. The answer comes last, followed by the end token if the
            document has one.
        answer_start: Position of the answer's first token in `input_ids`.
        answer_tokens: Length of the answer in tokens.
        key: Indices of the key's words in `PasskeyFormat.words`.
    """

    input_ids: np.ndarray
    answer_start: int
    answer_tokens: int
    key: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PasskeyFormat:
    """Token ids of the fixed texts in passkey documents, and of the words that keys consist of.

    Attributes:
        begin: [n] int64, tokens that the tokenizer adds before every document.
        statement: [n] int64, tokens before the key.
        reminder: [n] int64, tokens after the key.
        question: [n] int64, tokens before the answer.
        words: Token ids of the words that keys consist of, [n] int64 each.
        end: [1] int64, the end token; [0] if the tokenizer has none.
    """

    begin: np.ndarray
    statement: np.ndarray
    reminder: np.ndarray
    question: np.ndarray
    words: tuple[np.ndarray, ...]
    end: np.ndarray

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> PasskeyFormat:
        """Tokenizes each of the fixed texts, and chooses the words of keys.

        Raises:
            ValueError: if the tokenizer has no tokens for one of the texts.
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
        """Largest length, in tokens, of a document with KEY_WORDS words and no filler text.

        The end token is included.
        """
        return self._fixed + 2 * KEY_WORDS * self._longest_word

    @property
    def _fixed(self) -> int:
        """Length in tokens of a document without key, answer and filler; with the end token."""
        fixed = (self.begin, self.statement, self.reminder, self.question, self.end)
        return sum(map(len, fixed))

    @property
    def _longest_word(self) -> int:
        return max(map(len, self.words))

    def most_words(self, tokens: int) -> int:
        """Returns the largest number of words in the key of a document, at least KEY_WORDS.

        The filler is then at least as long as the key and the answer together.

        Args:
            tokens: Length of the document in tokens.
        """
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
        """Generates a document with a random key.

        Args:
            random: Random generator that draws the key and then the filler. From the same state, it
                draws the same key and filler for every depth.
            tokens: Length of the document in tokens, at least `shortest`.
            depth: Fraction of the filler that precedes the key, in [0, 1].
            filler: Text that the key is hidden in.
            with_end: Whether the document ends with the end token.
            key_words: Number of words in the key.
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
    """Returns up to MOST_WORDS words that are one token each; () if fewer than 64 are found.

    They are the last of the vocabulary's first 4096 words: a low token id means a frequent word,
    and the most frequent words would occur in most filler texts.
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
    """Text that keys are hidden in: a random range of tokens from concatenated documents."""

    def __init__(
        self,
        lengths: np.ndarray,
        read: Callable[[int, int, int], np.ndarray],
        begin: int = 0,
    ) -> None:
        """Concatenates tokenized documents without their begin tokens and their end token.

        Args:
            lengths: [N] integers, number of tokens of each document, the end token included.
            read: Returns the token ids [length] of a document, given (document, start, length).
            begin: Number of begin tokens in each document, which are left out.

        Raises:
            ValueError: if no tokens remain.
        """
        usable = np.maximum(np.asarray(lengths, dtype=np.int64) - 1 - begin, 0)
        self._ends = np.cumsum(usable)
        self._begin = begin
        self._read = read
        if len(usable) == 0 or self._ends[-1] == 0:
            raise ValueError(
                f"passkeys must be hidden in text, got {pluralize(len(usable), 'document')} "
                "without a token. "
                "Use more data."
            )

    @classmethod
    def of(cls, documents: Sequence[np.ndarray], begin: int = 0) -> Filler:
        """Builds a filler from documents in memory.

        Args:
            documents: Token ids of each document, [n] integers, the end token included.
            begin: Number of begin tokens in each document, which are left out.
        """
        lengths = np.array([len(document) for document in documents])
        return cls(
            lengths, lambda index, start, count: documents[index][start : start + count], begin
        )

    def take(self, random: np.random.Generator, tokens: int) -> np.ndarray:
        """Returns consecutive filler tokens from a random position: [tokens] int64.

        After the last document, the text continues with the first one.
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
