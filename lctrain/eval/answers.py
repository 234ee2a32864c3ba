"""score_prompts: answers prompts by generation or by likelihood, and scores the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lctrain.data.passkey import Passkey
from lctrain.eval.ahead import made_ahead
from lctrain.eval.answered import answered
from lctrain.eval.generate import generate_answers
from lctrain.eval.matching import ruler_score, strict_score
from lctrain.eval.prompt import TokenPrompt
from lctrain.eval.reader import Reader
from lctrain.eval.records import Measure
from lctrain.generation.pool_size import cache_tokens
from lctrain.instances import require_callable, require_instance
from lctrain.limits import check_by

MOST_PROMPTS = 64
"""Most prompts that are answered together from a paged cache, and that are made ahead. Progress
advances as often."""
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
    """Returns an iterator over the scored answer of each prompt.

    A thread makes the next prompts while the model answers.

    By likelihood, an answer is right if greedy decoding yields exactly its tokens, which one
    forward pass decides. Base models, which answer and then go on, are better measured so.

    Args:
        reader: The model.
        tokenizer: Tokenizer of the model.
        prompts: Prompts.
        by: "generation" or "likelihood".

    Raises:
        TypeError: if an argument has another type.
        ValueError: if `by` is unknown, or documents are cut into parts, which a decoder does not
            do.
    """
    require_instance("reader", reader, Reader, "Pass the one that Task.score is given.")
    require_callable("tokenizer", tokenizer, "Pass a tokenizer of transformers.")
    require_instance("prompts", prompts, Iterable, "Make them with lctrain.eval.tokenized.")
    check_by(by, "by")
    if by == "generation" and reader.segment is not None:
        raise ValueError(
            "methods must not name intra_chunk for a task by generation. Leave it out, or "
            "score by likelihood."
        )
    return _scored(reader, tokenizer, prompts, by)


def _scored(
    reader: Reader, tokenizer: Any, prompts: Iterable[TokenPrompt], by: str
) -> Iterator[Answer]:
    """Yields the scored answer of each prompt, as `score_prompts` describes."""
    answer, room = _decided, None
    if by == "generation":
        answer, room = _generated, cache_tokens(reader.model, reader.cache_gib)
        if room is None:
            reader = replace(reader, cache_gib=None)
    for batch in _batches(made_ahead(prompts, MOST_PROMPTS), _limit(reader, room)):
        yield from answer(reader, tokenizer, batch)
        reader.advance(len(batch))


def _limit(reader: Reader, room: int | None) -> Callable[[Sequence[int]], bool]:
    """Returns whether prompts of some sizes, answers included, are answered together.

    A paged cache holds as many tokens as the memory allows. `max_tokens` limits forward passes over
    rows, whose number of tokens grows with the number of prompts.

    Args:
        reader: The model.
        room: Tokens that a paged cache holds; None without one.
    """
    if room is None:
        return lambda sizes: max(sizes) * len(sizes) <= reader.max_tokens
    return lambda sizes: len(sizes) <= MOST_PROMPTS and sum(sizes) <= room


def _batches(
    prompts: Iterable[TokenPrompt], fits: Callable[[Sequence[int]], bool]
) -> Iterator[list[TokenPrompt]]:
    """Yields prompts in batches that fit; a prompt that does not fit is alone."""
    batch: list[TokenPrompt] = []
    sizes: list[int] = []
    for made in prompts:
        sizes.append(len(made.input_ids) + made.new_tokens)
        if batch and not fits(sizes):
            yield batch
            batch, sizes = [], sizes[-1:]
        batch.append(made)
    if batch:
        yield batch


def _generated(reader: Reader, tokenizer: Any, batch: list[TokenPrompt]) -> Iterator[Answer]:
    """Yields the answers that the model generates, each of its prompt's number of tokens."""
    most = max(made.new_tokens for made in batch)
    ids_of = [made.input_ids for made in batch]
    found = generate_answers(reader.model, ids_of, most, reader.cache_gib)
    for made, ids in zip(batch, found, strict=True):
        prompt = made.prompt
        text = tokenizer.decode(ids[: made.new_tokens], skip_special_tokens=True)
        yield Answer(
            text,
            ruler_score(text, prompt.references, prompt.match),
            strict_score(text, prompt.references, prompt.match),
        )


def _decided(reader: Reader, tokenizer: Any, batch: list[TokenPrompt]) -> Iterator[Answer]:
    """Yields the answers by likelihood, from one forward pass."""
    documents = [
        Passkey(np.r_[p.input_ids, p.answer_ids], len(p.input_ids), len(p.answer_ids), ())
        for p in batch
    ]
    right = answered(reader.model, documents, reader.segment, reader.device)
    for made, one in zip(batch, right, strict=True):
        text = tokenizer.decode(made.answer_ids) if one else ""
        yield Answer(text, float(one), float(one))
