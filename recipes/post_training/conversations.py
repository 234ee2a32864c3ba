"""Writes the recipe's conversations: `python -m lctrain.recipes.post_training.conversations`.

A user gives three pairs of words and asks, twice, which word goes with one of them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FILE = Path(__file__).parent / "conversations.jsonl"
TEMPLATE = Path(__file__).parent / "template.jinja"
NUMBER = 600
SEED = 0
WORDS = """
access after args assert base before being block both bound break bytes call calls cannot case
check class classes command comment copy count create created current each either empty equal
error errors event files finally finder found frame future given global globals handler hash
help index input instead integer item items keys keyword lambda last left length level limit
lines loader local loop main make manager mapping match message more names nested next node
numbers open option order output over package pairs parent parser part pass passed pattern point
process queue raised recent result results return returns right root runner section single size
some source special stack start state still string strings super syntax table target test tests
their then these those through time timeout true tuple types while within without yield zero
""".split()  # noqa: SIM905


def conversations(number: int = NUMBER, seed: int = SEED) -> list[dict[str, object]]:
    """Returns conversations in the format of `messages`; a seed always gives the same ones.

    Args:
        number: Number of conversations.
        seed: Seed of the words.
    """
    draw = random.Random(seed)
    return [_conversation(draw) for _ in range(number)]


def _conversation(draw: random.Random) -> dict[str, object]:
    words = draw.sample(WORDS, 6)
    pairs = dict(zip(words[:3], words[3:], strict=True))
    first, second = draw.sample(words[:3], 2)
    given = ", ".join(f"{word} {partner}" for word, partner in pairs.items())
    turns = [f"Pairs: {given}. Which goes with {first}?", f"And with {second}?"]
    messages = []
    for question, word in zip(turns, (first, second), strict=True):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": f"{word} {pairs[word]}"})
    return {"messages": messages}


def main() -> None:
    """Writes the file that is shipped."""
    lines = [json.dumps(conversation) for conversation in conversations()]
    FILE.write_text("\n".join(lines) + "\n")
    print(f"Wrote {len(lines)} conversations into {FILE}")


if __name__ == "__main__":
    main()
