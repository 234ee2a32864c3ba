"""The task needle: a sentence hidden in text, by depth and length, answered by the model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lctrain.data.passkey import Filler
from lctrain.data.tokenizer import tokens_around
from lctrain.eval.answers import MEASURES, score_prompts
from lctrain.eval.limits import check_model
from lctrain.eval.prompt import Prompt, TokenPrompt, tokenized, tokens_of
from lctrain.eval.reader import Reader
from lctrain.eval.records import Item, Subject
from lctrain.eval.ruler.words import digits, key_words
from lctrain.eval.task import Task
from lctrain.limits import check_by, check_passkeys

if TYPE_CHECKING:
    from lctrain.config import EvalConfig

NEW_TOKENS = 24


class Needle(Task):
    """Finds a number that one sentence of a text tells. Its items are needles.

    The text is concatenated from tokens, so that the needle is whole, its depth is exact in tokens,
    and prompt and answer together have exactly the asked length.

    Args:
        depths: Fractions of the text before the needle, in [0, 1].
        needles: Number of needles for each length and depth.
        seed: Seed of the needles and of the choice of text.
        by: "generation", or "likelihood" of the answer for base models.
        lengths: Lengths in tokens, answer included; None for those of the evaluation.
        methods: Methods to compare; None for those of the evaluation.
    """

    name = "needle"
    measures: ClassVar = MEASURES
    title: ClassVar = "Needles"
    unit: ClassVar = "needle"

    def __init__(
        self,
        *,
        depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        needles: int = 4,
        seed: int = 0,
        by: str = "generation",
        lengths: Sequence[int] | None = None,
        methods: Sequence[str] | None = None,
    ) -> None:
        self.depths = check_passkeys(depths, needles, seed, "needle.", "needles")
        check_by(by, "needle.by")
        self.needles = needles
        self.seed = seed
        self.by = by
        self.lengths = lengths
        self.methods = methods

    @classmethod
    def of(cls, config: EvalConfig) -> Needle:
        """Returns the task with the settings of an evaluation."""
        o = config.needle
        return cls(
            depths=o.depths,
            needles=o.needles,
            seed=o.seed,
            by=o.by,
            lengths=o.lengths,
            methods=o.methods,
        )

    def prepare(self, subject: Subject, lengths: tuple[int, ...]) -> None:
        """Checks that every needle fits into the shortest length: see Task.

        Raises:
            ValueError: if it does not, or the tokenizer cannot represent an answer.
        """
        super().prepare(subject, lengths)
        begin, _ = tokens_around(subject.require_tokenizer(self.name))
        self._begin = np.array(begin, dtype=np.int64)
        texts = [document.input_ids for document in subject.documents]
        self._filler = Filler.of(texts, len(self._begin))
        made = [self.prompt(lengths[0], 0.0, number) for number in range(self.needles)]
        ids = [part for one in made for part in (one.input_ids, one.answer_ids)]
        check_model(subject.model, [*ids, *texts], lengths[-1])

    def make(self, length: int) -> list[tuple[float, int]]:
        """Returns the depths and numbers of the needles: see Task."""
        return [(depth, n) for depth in self.depths for n in range(self.needles)]

    def score(
        self, reader: Reader, length: int, made: Sequence[tuple[float, int]]
    ) -> Iterator[Item]:
        """Yields the score of every needle: see Task."""
        prompts = (self.prompt(length, depth, number) for depth, number in made)
        answers = score_prompts(reader, self.subject.tokenizer, prompts, self.by)
        for (depth, number), answer in zip(made, answers, strict=True):
            name = f"depth {depth} needle {number}"
            yield Item(name, answer.totals, 1.0, {"depth": depth}, answer.text)

    def size(self, length: int) -> int:
        """Returns the number of needles: see Task."""
        return len(self.depths) * self.needles

    def prompt(self, length: int, depth: float, number: int) -> TokenPrompt:
        """Returns the prompt of a needle.

        Args:
            length: Tokens of prompt and answer together.
            depth: Fraction of the text before the needle.
            number: Number of the needle; at all depths it has the same key, value and text.
        """
        numbers = random.Random(f"{self.seed} needle {length} {number}")
        key, value = key_words(numbers), digits(numbers)
        needle = self._ids(f" The special magic number for {key} is {value}.")
        question = Prompt(
            f"\nWhat is the special magic number for {key}? The special magic number for {key} is",
            (value,),
            "all",
            NEW_TOKENS,
        )
        asked = tokenized(self.subject.tokenizer, question)
        ids = asked.input_ids[len(self._begin) :]
        room = length - asked.new_tokens - len(self._begin) - len(needle) - len(ids)
        if room < 0:
            raise ValueError(
                f"needle lengths must be at least {length - room}, the tokens of needle, question "
                f"and answer, got {length}. Leave it out."
            )
        text = self._filler.take(np.random.default_rng([self.seed, length, number]), room)
        place = round(depth * room)
        parts = [self._begin, text[:place], needle, text[place:], ids]
        return TokenPrompt(np.concatenate(parts), asked.answer_ids, question)

    def _ids(self, text: str) -> np.ndarray:
        ids = tokens_of(self.subject.tokenizer, text)
        return np.array(ids[len(self._begin) :], dtype=np.int64)
