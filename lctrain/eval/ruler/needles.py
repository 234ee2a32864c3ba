"""Needles: RULER's tasks niah_*, which hide values under keys and ask for some of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lctrain.eval.prompt import Prompt, joined
from lctrain.eval.ruler.family import NOISE, placed
from lctrain.eval.ruler.words import digits, distinct, identifier, key_words

KINDS = {"numbers": digits, "uuids": identifier, "words": key_words}
HAYSTACKS = ("noise", "text", "needles")


@dataclass(frozen=True)
class Needles:
    """Values that are hidden under keys in a haystack.

    Attributes:
        haystack: "noise" for five repeated sentences, "text" for words of `text`, "needles" for
            other keys and values.
        keys: Kind of the keys: numbers, uuids or words.
        values: Kind of the values.
        hidden: Number of keys in the text; with the haystack "needles" it is the haystack.
        per_key: Number of values under each key.
        asked: Number of keys that the question asks for.
        text: Words of the haystack "text".
    """

    haystack: str = "noise"
    keys: str = "words"
    values: str = "numbers"
    hidden: int = 1
    per_key: int = 1
    asked: int = 1
    text: Sequence[str] = ()
    smallest: int = 1

    def build(self, units: int, numbers: random.Random) -> Prompt:
        """See Family. A unit is a sentence of noise, a word of text or a needle."""
        taken: set[str] = set()
        hidden = max(self.hidden, self.asked)
        names = distinct(numbers, KINDS[self.keys], hidden, taken)
        found = {name: distinct(numbers, KINDS[self.values], self.per_key, taken) for name in names}
        asked = numbers.sample(names, self.asked)
        pairs = [(name, value) for name in names for value in found[name]]
        order = numbers.sample(pairs, len(pairs))
        depths = sorted(numbers.randint(0, 39) / 39 for _ in order)
        start = numbers.randint(0, 1_000_000)
        filler = self._filler(units, start, numbers, taken)
        places = [round(depth * len(filler)) for depth in depths]
        between = " " if self.haystack == "text" else "\n"
        context = between.join(placed(filler, [self._needle(*pair) for pair in order], places))
        # an answer names the values of a key in their order in the text
        values = tuple(value for name in asked for key, value in order if key == name)
        return self._prompt(context, asked, values)

    def _filler(self, units: int, start: int, numbers: random.Random, taken: set[str]) -> list[str]:
        if self.haystack == "noise":
            return [NOISE] * units
        if self.haystack == "text":
            words = self.text
            return [words[(start + n) % len(words)] for n in range(units)]
        sentences: list[str] = []
        while len(sentences) < units:
            name = KINDS[self.keys](numbers)
            if name not in taken:  # the key of a needle names one value
                sentences.append(self._needle(name, KINDS[self.values](numbers)))
        return sentences

    def _needle(self, name: str, value: str) -> str:
        return f"One of the special magic {self.values} for {name} is: {value}."

    def _prompt(self, context: str, asked: Sequence[str], values: tuple[str, ...]) -> Prompt:
        query = joined(asked)
        kind = self.values
        if len(values) > 1:
            head = f"Some special magic {kind} are hidden within the following text."
            question = f"What are all the special magic {kind} for {query} mentioned in the "
            prefix = f" The special magic {kind} for {query} mentioned in the provided text are"
        else:
            kind = kind.removesuffix("s")
            head = f"A special magic {kind} is hidden within the following text."
            question = f"What is the special magic {kind} for {query} mentioned in the "
            prefix = f" The special magic {kind} for {query} mentioned in the provided text is"
        memorize = f" Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
        text = f"{head}{memorize}{context}\n{question}provided text?{prefix}"
        return Prompt(text, values, "all", 128)
