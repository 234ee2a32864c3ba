"""VariableTracking: RULER's task vt, which asks for all variables of one value."""

from __future__ import annotations

import itertools
import random
import string
from dataclasses import dataclass

from lctrain.eval.prompt import Prompt
from lctrain.eval.ruler.family import NOISE, placed
from lctrain.eval.ruler.words import distinct


@dataclass(frozen=True)
class VariableTracking:
    """A chain of assignments, such as VAR X = 12345 and VAR Y = VAR X, in sentences of noise.

    A unit is five sentences of noise.

    Attributes:
        chains: Number of chains; the question asks for one of them.
        hops: Number of assignments from a variable in a chain.
        example: Whether a small solved example precedes the question, as in RULER.
    """

    chains: int = 1
    hops: int = 4
    example: bool = True
    smallest: int = 1

    def build(self, units: int, numbers: random.Random) -> Prompt:
        """See Family."""
        shown = ""
        if self.example:
            question, names = self._question(5, 3, numbers)
            shown = f"{question} {' '.join(names)}\n\n\n\n"
        question, names = self._question(units, 5, numbers)
        return Prompt(shown + question, names, "all", 30, " ".join(names))

    def _question(
        self, units: int, letters: int, numbers: random.Random
    ) -> tuple[str, tuple[str, ...]]:
        """Returns a question up to its answer, and the names of the variables."""
        count = self.chains * (self.hops + 1)
        names = distinct(
            numbers, lambda r: "".join(r.choices(string.ascii_uppercase, k=letters)), count, set()
        )
        values = distinct(numbers, lambda r: str(r.randint(10_000, 99_999)), self.chains, set())
        asked: tuple[str, ...] = ()
        filler = [NOISE] * units
        for chain, value in enumerate(values):
            mine = names[chain * (self.hops + 1) : (chain + 1) * (self.hops + 1)]
            asked = asked or tuple(mine)
            steps = [f"VAR {mine[0]} = {value}"]
            steps += [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(mine)]
            places = sorted(round(numbers.randint(0, 39) / 39 * len(filler)) for _ in steps)
            filler = placed(filler, steps, places)
        context = "\n".join(filler)
        text = (
            "Memorize and track the chain(s) of variable assignment hidden in the following text."
            f"\n\n{context}\nQuestion: Find all variables that are assigned the value {values[0]} "
            "in the text above. Answer: According to the chain(s) of variable assignment in the "
            f"text above, {self.hops + 1} variables are assgined the value {values[0]}, they are:"
        )
        return text, asked
