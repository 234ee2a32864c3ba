"""CommonWords and FrequentWords: RULER's tasks cwe and fwe, which ask for the words seen most."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lctrain.eval.prompt import Prompt
from lctrain.eval.ruler.words import made_up_words


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which ten words are repeated more often than all others.

    A unit is a word that is not common.

    Attributes:
        common: Number of common words.
        often: Repetitions of a common word.
        seldom: Repetitions of every other word.
        example: Whether a small solved example precedes the question, as in RULER.
    """

    common: int = 10
    often: int = 30
    seldom: int = 3
    example: bool = True
    smallest: int = 1

    def build(self, units: int, numbers: random.Random) -> Prompt:
        """See Family."""
        shown = ""
        if self.example:
            question, words = self._question(10, 3, 1, numbers)
            shown = f"{question} {_numbered(words)}\n"
        question, words = self._question(units, self.often, self.seldom, numbers)
        return Prompt(shown + question, words, "all", 120, _numbered(words))

    def _question(
        self, others: int, often: int, seldom: int, numbers: random.Random
    ) -> tuple[str, tuple[str, ...]]:
        """Returns a question up to its answer, and the common words as they first appear."""
        common = made_up_words(numbers, self.common)
        rest = [w for w in made_up_words(numbers, others + self.common) if w not in common]
        words = common * often + rest[:others] * seldom
        numbers.shuffle(words)
        context = _numbered(words)
        text = (
            "Below is a numbered list of words. In these words, some appear more often than "
            f"others. Memorize the ones that appear most often.\n{context}\nQuestion: What are the "
            f"{self.common} most common words in the above list? Answer: The top {self.common} "
            "words that appear most often in the list are:"
        )
        return text, tuple(sorted(common, key=words.index))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{n}. {word}" for n, word in enumerate(words, 1))


@dataclass(frozen=True)
class FrequentWords:
    """A coded text whose words follow a Zipf distribution; the question asks for three.

    A unit is a coded word of the text. The first word of the distribution stands for noise.

    Attributes:
        alpha: Exponent of the distribution.
        smallest: Smallest number of coded words, with which the third is ahead of the fourth.
    """

    alpha: float = 2.0
    smallest: int = 60

    def build(self, units: int, numbers: random.Random) -> Prompt:
        """See Family."""
        kinds = max(8, units // 50)
        words = made_up_words(numbers, kinds)
        weights = [1 / n**self.alpha for n in range(1, kinds + 1)]
        scale = units / sum(weights)
        counts = [max(1, round(scale * weight)) for weight in weights]
        for place in range(3, 0, -1):  # three words are ahead of all others
            counts[place] = max(counts[place], counts[place + 1] + 1)
        text = ["..."] * counts[0]
        for word, count in zip(words[1:], counts[1:], strict=True):
            text += [word] * count
        numbers.shuffle(text)
        context = " ".join(text)
        prompt = (
            "Read the following coded text and track the frequency of each coded word. Find the "
            f"three most frequently appeared coded words. {context}\nQuestion: Do not provide any "
            "explanation. Please ignore the dots '....'. What are the three most frequently "
            "appeared words in the above coded text? Answer: According to the coded text above, "
            "the three most frequently appeared words are:"
        )
        return Prompt(prompt, tuple(words[1:4]), "all", 50)
