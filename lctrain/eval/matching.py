"""Scores of an answer: RULER's containment, and a strict match of whole words beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence

MATCHES = ("all", "part")
_CONTROL = re.compile(r"[\x00-\x1f]")


def ruler_score(answer: str, references: Sequence[str], match: str) -> float:
    """Returns RULER's score of an answer: references that it contains, whatever their case.

    Args:
        answer: Text that the model answered.
        references: Expected texts, none of them empty.
        match: "all" for the share of references, "part" for 1 if the answer contains any.

    Raises:
        ValueError: if there is no reference, or one is empty: every answer contains it.
    """
    text = _CONTROL.sub("\n", answer.strip()).strip().lower()
    return _combine([reference.lower() in text for reference in _checked(references)], match)


def strict_score(answer: str, references: Sequence[str], match: str) -> float:
    """Returns the score of whole words: "42" is not in "1423", and "cat" not in "cats".

    Args:
        answer: Text that the model answered.
        references: Expected texts, none of them empty.
        match: "all" for the share of references, "part" for 1 if the answer contains any.
    """
    text = answer.lower()
    found = [
        re.search(rf"(?<![\w-]){re.escape(reference.lower())}(?![\w-])", text) is not None
        for reference in _checked(references)
    ]
    return _combine(found, match)


def _combine(found: Sequence[bool], match: str) -> float:
    return float(any(found)) if match == "part" else sum(found) / len(found)


def _checked(references: Sequence[str]) -> Sequence[str]:
    if not references or not all(reference.strip() for reference in references):
        raise ValueError(
            f"references must be texts that are not empty, got {list(references)}. Every answer "
            "contains an empty one."
        )
    return references
