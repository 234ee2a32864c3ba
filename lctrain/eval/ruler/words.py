"""Words of RULER's prompts: keys, numbers, identifiers, and words that no text contains."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable

_ADJECTIVES = """
able brave brown calm clean clever cold cosmic crisp curious dark deep dry eager early fair
famous fancy fast fierce fine firm fresh gentle glad golden grand green happy heavy hidden high
honest humble icy jolly keen kind large late lively long loud lucky mellow merry mild modern
narrow neat noble odd old open pale plain proud quick quiet rapid rare ready red rich round
royal rural sharp shiny short shy silent silver simple sleepy slow small smart smooth soft solid
spare steady still strange strong sunny sweet swift tall tame thick tidy tiny true vast warm
wide wild wise young
"""
_NOUNS = """
acorn anchor apple arrow badge barn basin basket beacon bell bench bird boat bottle branch bread
bridge brook broom bucket cabin candle canyon carpet castle chair chest clock cloud coast comet
copper corner cottage cup desert door drum eagle engine falcon farm feather field flag flute
forest fountain fox garden gate glove harbor hat hill horse island jacket kettle key kite ladder
lake lamp lantern leaf lemon letter lion maple meadow mill mirror moon mountain needle nest oak
ocean orchard owl paper path pearl pencil piano pillow pond river road rope saddle sail shell
ship spoon star stone table tower train valley violin wagon window
"""
_CONSONANTS = "bcdfghjklmnprstvz"
_VOWELS = "aeiou"


def key_words(numbers: random.Random) -> str:
    """Returns a key of two words, such as "quiet-harbor"."""
    return f"{numbers.choice(_ADJECTIVES.split())}-{numbers.choice(_NOUNS.split())}"


def digits(numbers: random.Random) -> str:
    """Returns a number of seven digits."""
    return str(numbers.randint(1_000_000, 9_999_999))


def identifier(numbers: random.Random) -> str:
    """Returns a UUID."""
    return str(uuid.UUID(int=numbers.getrandbits(128), version=4))


def made_up_words(numbers: random.Random, count: int) -> list[str]:
    """Returns different words of three syllables, none of which contains another.

    Args:
        numbers: Random numbers.
        count: Number of words, at most 614,125.
    """
    syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
    places = numbers.sample(range(len(syllables) ** 3), count)
    size = len(syllables)
    return [
        syllables[p // size**2] + syllables[p // size % size] + syllables[p % size] for p in places
    ]


def distinct(
    numbers: random.Random, make: Callable[[random.Random], str], count: int, taken: set[str]
) -> list[str]:
    """Returns different texts of `make(numbers)` that are not in `taken`."""
    found: list[str] = []
    while len(found) < count:
        text = make(numbers)
        if text not in taken:
            taken.add(text)
            found.append(text)
    return found
