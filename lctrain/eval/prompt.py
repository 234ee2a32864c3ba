"""Prompt: a question about a long text, with the expected answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lctrain.eval.matching import ruler_score
from lctrain.instances import require_callable, require_instance

END_CHARACTERS = 1000
"""Characters of a prompt's end that are tokenized with the answer."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as text.

    Attributes:
        text: Context and question, up to where the answer begins.
        references: Expected texts.
        match: "all" if the answer needs all references, "part" if it needs one.
        new_tokens: Largest number of tokens in the answer; more if the expected one has more.
        form: The expected answer as the prompt asks for it; empty for the references in a list.
    """

    text: str
    references: tuple[str, ...]
    match: str = "all"
    new_tokens: int = 128
    form: str = ""

    @property
    def answer(self) -> str:
        """The expected answer: all references, or the first one if one is enough."""
        words = self.references[:1] if self.match == "part" else self.references
        return self.form or ", ".join(words)


@dataclass(frozen=True, eq=False)
class TokenPrompt:
    """A prompt as tokens.

    Attributes:
        input_ids: [n] int64, the prompt.
        answer_ids: [m] int64, the expected answer, all references in order.
        prompt: The same as text.
    """

    input_ids: np.ndarray
    answer_ids: np.ndarray
    prompt: Prompt

    @property
    def new_tokens(self) -> int:
        """Largest number of tokens in the answer: with fine tokens, those of the expected one."""
        return max(self.prompt.new_tokens, len(self.answer_ids))


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of a text, which begins as the tokenizer begins texts."""
    require_callable("tokenizer", tokenizer, "Pass a tokenizer of transformers.")
    ids: list[int] = list(tokenizer(text, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    return ids[:-1] if end is not None and len(ids) > 1 and ids[-1] == end else ids


def tokenized(tokenizer: Any, prompt: Prompt) -> TokenPrompt:
    """Returns a prompt as tokens.

    The answer's tokens are those of prompt and answer together, from where they differ from the
    prompt alone, since a tokenizer may merge characters across the border.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: The prompt.

    Raises:
        ValueError: if the tokenizer cannot represent the answer.
    """
    require_instance("prompt", prompt, Prompt, "Build one with its text and references.")
    ids = tokens_of(tokenizer, prompt.text)
    words = prompt.references[:1] if prompt.match == "part" else prompt.references
    for found in (_at_the_end(tokenizer, prompt, ids), _in_the_whole(tokenizer, prompt, ids)):
        prefix, answer = next(found, ([], []))
        if answer and ruler_score(tokenizer.decode(answer), words, "all") == 1.0:
            return TokenPrompt(np.array(prefix), np.array(answer), prompt)
    raise ValueError(
        f"tokenizer must represent the answer {prompt.answer!r}, got "
        f"{tokenizer.decode(answer)!r} back. Leave this task out with this tokenizer."
    )


def _at_the_end(
    tokenizer: Any, prompt: Prompt, ids: list[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the tokens of prompt and answer, if the end of the prompt suffices to find them.

    A tokenizer divides a text at spaces, or nearly so. So the prompt, which may be long, is not
    tokenized a second time. Nothing is yielded if the end alone has other tokens.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: The prompt.
        ids: Tokens of the prompt.
    """
    border = prompt.text.find(" ", max(len(prompt.text) - END_CHARACTERS, 0))
    if len(prompt.text) <= END_CHARACTERS or border < 0:
        return
    end = prompt.text[border:]
    alone = tokens_of(tokenizer, end)
    together = tokens_of(tokenizer, f"{end} {prompt.answer}")
    same = _common(alone, together)
    known = len(alone) // 2
    if known > len(alone) - same and ids[-known:] == alone[-known:]:
        yield ids[: len(ids) - len(alone) + same], together[same:]


def _in_the_whole(
    tokenizer: Any, prompt: Prompt, ids: list[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the tokens of prompt and answer, from those of both together."""
    together = tokens_of(tokenizer, f"{prompt.text} {prompt.answer}")
    same = _common(ids, together)
    yield together[:same], together[same:]


def _common(first: list[int], second: list[int]) -> int:
    """Returns the number of leading tokens that two texts have in common."""
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    return same


def fitting_units(
    tokens: Callable[[int], int], room: int, smallest: int, name: str, extra: int
) -> int:
    """Returns the largest number of units with which a prompt fits, by doubling and bisection.

    Long prompts take long to count. So interpolation finds bounds close to the result first, and
    what lies outside them is not counted.

    Args:
        tokens: Returns the tokens of a prompt of a number of units. Where it no longer rises, the
            search ends.
        room: Largest number of tokens of the prompt.
        smallest: Smallest number of units of a prompt.
        name: Name of the task, for the message.
        extra: Tokens of the answer, which the length includes.

    Raises:
        ValueError: if the smallest prompt does not fit.
    """
    require_callable("tokens", tokens, "Pass a function of a number of units.")
    shortest = tokens(smallest)
    if shortest > room:
        raise ValueError(
            f"lengths must be at least {shortest + extra} for {name} with this tokenizer, got "
            f"{room + extra}. Leave it out."
        )
    fits, known, over = _bounds(tokens, room, smallest, shortest)
    low, high = smallest, max(2 * smallest, 2)
    while high < over and (high <= fits or known < (size := tokens(high)) <= room):
        if high > fits:
            fits, known = high, size
        low, high = high, 2 * high
    if high < over:
        if size <= room:
            return low
        over = high
    while high - low > max(1, low // 64):  # a prompt within 2 % of the length
        middle = (low + high) // 2
        below = middle <= fits or (middle < over and tokens(middle) <= room)
        low, high = (middle, high) if below else (low, middle)
    return low


def _bounds(
    tokens: Callable[[int], int], room: int, smallest: int, shortest: int
) -> tuple[int, int, float]:
    """Returns bounds of the units that fit, by interpolation.

    Args:
        tokens: Returns the tokens of a prompt of a number of units.
        room: Largest number of tokens of the prompt.
        smallest: Smallest number of units of a prompt.
        shortest: Tokens of that prompt.

    Returns:
        A number of units that fits, its tokens, and one that does not fit; infinity if none was
        found, as where tokens do not rise.
    """
    (fits, known), (over, beyond) = (smallest, shortest), (math.inf, math.inf)
    units = smallest + 32
    for goal in (room / 8, room, room, room, room):
        size = tokens(units)
        if size > room:
            over, beyond = units, size
        elif size <= known:
            break
        else:
            fits, known = units, size
        if over - fits <= max(1, fits // 64):
            break
        # the line through the nearest bounds, or from the smallest prompt
        start, end = (fits, known), (over, beyond)
        if over == math.inf:
            start, end = (smallest, shortest), start
        target = fits + (goal - known) * (end[0] - start[0]) / (end[1] - start[1])
        margin = target / 200  # towards the bound that is missing, or farther away
        if over == math.inf or (over - target > target - fits and fits > smallest):
            units = max(fits + 1, int(min(math.ceil(target + margin), over - 1)))
        else:
            units = min(int(over) - 1, max(int(target - margin), fits + 1))
    return fits, known, over


def joined(words: Sequence[str]) -> str:
    """Returns words as a list in a sentence: "a, b, and c"."""
    return ", ".join(words) if len(words) < 2 else f"{', '.join(words[:-1])}, and {words[-1]}"
