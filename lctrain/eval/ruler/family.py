"""Family: a family of prompts whose length follows from a number of units."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from lctrain.eval.prompt import Prompt

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class Family(Protocol):
    """Protocol of a kind of prompt.

    Attributes:
        smallest: Smallest number of units of a prompt.
    """

    @property
    def smallest(self) -> int:
        """Smallest number of units of a prompt."""

    def build(self, units: int, numbers: random.Random) -> Prompt:
        """Returns a prompt.

        Args:
            units: Number of units of context, such as sentences.
            numbers: Random numbers. From the same state, prompts of other sizes have the same
                answers.
        """


def scattered(units: Sequence[str], inserted: Sequence[str], numbers: random.Random) -> list[str]:
    """Returns the units with further texts at random places, in random order of the texts."""
    places = sorted(numbers.randint(0, len(units)) for _ in inserted)
    order = numbers.sample(list(inserted), len(inserted))
    return placed(units, order, places)


def placed(units: Sequence[str], inserted: Sequence[str], places: Sequence[int]) -> list[str]:
    """Returns the units with each inserted text before the unit at its place.

    Args:
        units: Texts.
        inserted: Texts to insert.
        places: Rising places of the inserted texts, in [0, number of units].
    """
    found: list[str] = []
    start = 0
    for text, place in zip(inserted, places, strict=True):
        found += [*units[start:place], text]
        start = place
    return [*found, *units[start:]]
