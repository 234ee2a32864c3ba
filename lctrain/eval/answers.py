"""score_prompts: answers prompts by generation or by likelihood, and scores the answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lctrain.data.passkey import Passkey
from lctrain.eval.answered import answered
from lctrain.eval.generate import generate_answers
from lctrain.eval.matching import ruler_score, strict_score
from lctrain.eval.prompt import TokenPrompt
from lctrain.eval.reader import Reader
from lctrain.eval.records import Measure

MEASURES = (
    Measure("score", "RULER score", is_share=True, threshold=0.856),
    Measure("strict", "Strict score, whole words", is_share=True, threshold=0.856),
)


@dataclass(frozen=True)
class Answer:
    """A scored answer.

    Attributes:
        text: Text that the model answered; by likelihood, the expected answer if it is found.
        score: RULER's score, in [0, 1].
        strict: Strict score, in [0, 1].
    """

    text: str
    score: float
    strict: float

    @property
    def totals(self) -> dict[str, float]:
        """The scores by name of the measure."""
        return {"score": self.score, "strict": self.strict}


def score_prompts(
    reader: Reader, tokenizer: Any, prompts: Iterable[TokenPrompt], by: str
) -> Iterator[Answer]:
    """Yields the scored answer of each prompt.

    By likelihood, an answer is right if greedy decoding yields exactly its tokens, which one
    forward pass decides. Base models, which answer and then go on, are better measured so.

    Args:
        reader: The model.
        tokenizer: Tokenizer of the model.
        prompts: Prompts.
        by: "generation" or "likelihood".

    Raises:
        ValueError: if documents are cut into parts, which a decoder does not do.
    """
    if by == "likelihood":
        yield from _by_likelihood(reader, tokenizer, prompts)
        return
    if reader.segment is not None:
        raise ValueError(
            "methods must not name intra_chunk for a task by generation, got it. Leave it out, or "
            "score by likelihood."
        )
    for made in prompts:
        prompt = made.prompt
        (ids,) = generate_answers(reader.model, [made.input_ids], prompt.new_tokens)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        yield Answer(
            text,
            ruler_score(text, prompt.references, prompt.match),
            strict_score(text, prompt.references, prompt.match),
        )
        reader.advance(1)


def _by_likelihood(
    reader: Reader, tokenizer: Any, prompts: Iterable[TokenPrompt]
) -> Iterator[Answer]:
    """Yields answers by likelihood, of as many prompts in a forward pass as fit."""
    batch: list[TokenPrompt] = []
    longest = 0
    for made in prompts:
        size = len(made.input_ids) + len(made.answer_ids)
        if batch and max(longest, size) * (len(batch) + 1) > reader.max_tokens:
            yield from _decided(reader, tokenizer, batch)
            batch, longest = [], 0
        batch.append(made)
        longest = max(longest, size)
    if batch:
        yield from _decided(reader, tokenizer, batch)


def _decided(reader: Reader, tokenizer: Any, batch: list[TokenPrompt]) -> Iterator[Answer]:
    documents = [
        Passkey(np.r_[p.input_ids, p.answer_ids], len(p.input_ids), len(p.answer_ids), ())
        for p in batch
    ]
    right = answered(reader.model, documents, reader.segment, reader.device)
    for made, one in zip(batch, right, strict=True):
        text = tokenizer.decode(made.answer_ids) if one else ""
        yield Answer(text, float(one), float(one))
    reader.advance(len(batch))
