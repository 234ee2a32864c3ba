"""Questions: RULER's task qa, with questions and documents of a local file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lctrain.eval.prompt import Prompt


@dataclass(frozen=True)
class Question:
    """A question that one document answers.

    Attributes:
        question: The question.
        answers: Texts of which each is right.
        context: Document with the answer.
    """

    question: str
    answers: tuple[str, ...]
    context: str


@dataclass(frozen=True)
class Questions:
    """A question whose document stands among documents of other questions.

    A unit is a document. If there are more units than documents, they are repeated.

    Attributes:
        entries: All questions.
    """

    entries: Sequence[Question]
    smallest: int = 1

    def build(self, units: int, numbers: random.Random) -> Prompt:
        """See Family."""
        asked = numbers.choice(list(self.entries))
        others = sorted({e.context for e in self.entries if e.context != asked.context})
        numbers.shuffle(others)
        rest = [others[n % len(others)] for n in range(units - 1)]
        place = numbers.random()
        rest.insert(round(place * len(rest)), asked.context)
        context = "\n\n".join(f"Document {n}:\n{text}" for n, text in enumerate(rest, 1))
        task = (
            "Answer the question based on the given documents. Only give me the answer and do not "
            "output any other words."
        )
        text = (
            f"{task}\n\nThe following are given documents.\n\n{context}\n\n{task}\n\nQuestion: "
            f"{asked.question} Answer:"
        )
        return Prompt(text, asked.answers, "part", 32)


def read_questions(file: str | Path) -> list[Question]:
    """Reads questions from JSON lines with the keys question, answers and context.

    Args:
        file: Path of the file.

    Raises:
        ValueError: if the file is not there, a line is no such entry, an answer is empty, or all
            questions have one context.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(
            f"ruler.questions must be a file of JSON lines, got {file}, which is not there. Check "
            "the path."
        )
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            answers = tuple(entry["answers"])
            question, context = entry["question"], entry["context"]
            texts = [question, context, *answers]
            if not answers or not all(isinstance(t, str) and t.strip() for t in texts):
                raise ValueError("an empty text")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"ruler.questions must hold a question, answers and a context in each line, got "
                f"line {number} of {file} ({error}). No text may be empty."
            ) from error
        found.append(Question(question, answers, context))
    if not found:
        raise ValueError(f"ruler.questions must hold a question, got none in {file}. Add some.")
    if len({entry.context for entry in found}) == 1:
        raise ValueError(
            f"ruler.questions must hold at least two contexts, got one in {file}. Those of other "
            "questions surround the one with the answer."
        )
    return found
