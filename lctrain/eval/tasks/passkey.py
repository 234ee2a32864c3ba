"""The task passkey: finds keys that are hidden in long texts, by depth and length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lctrain.data.passkey import Filler, Passkey, PasskeyFormat
from lctrain.eval import answered
from lctrain.eval.answers import score_prompts
from lctrain.eval.extension import trained_window
from lctrain.eval.limits import check_model
from lctrain.eval.passkey_table import PasskeyTable
from lctrain.eval.prompt import Prompt, TokenPrompt
from lctrain.eval.reader import Reader
from lctrain.eval.records import Item, Measure, Result, Subject
from lctrain.eval.task import Task
from lctrain.limits import check_by, check_passkeys

if TYPE_CHECKING:
    from lctrain.config import AttentionConfig, EvalConfig

DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Hidden:
    """A key to hide.

    Attributes:
        length: Length of the text in tokens.
        depth: Fraction of the filler text before the key.
        key: Number of the key.
    """

    length: int
    depth: float
    key: int


class PasskeyRetrieval(Task):
    """Finds keys that are hidden in texts. Its items are keys: see `passkey_retrieval`.

    Args:
        depths: Depths of the key: fractions of the filler text before it, in [0, 1].
        keys_per_cell: Number of keys for each length and depth.
        seed: Seed of the keys and of the choice of filler.
        by: "likelihood", or "generation" of the answer.
        lengths: Lengths of the texts in tokens; None for those of the evaluation.
        methods: Methods to compare; None for those of the evaluation.
        unnamed: Name of the method in the table for the model as it is.
        format: Passkey format; None for that of the subject's tokenizer.
    """

    measures: ClassVar = (Measure("accuracy", "Keys found", is_share=True),)
    name = "passkey"
    title: ClassVar = "Passkeys"
    unit: ClassVar = "key"

    def __init__(
        self,
        *,
        depths: Sequence[float] = DEPTHS,
        keys_per_cell: int = 20,
        seed: int = 0,
        by: str = "likelihood",
        lengths: Sequence[int] | None = None,
        methods: Sequence[str] | None = None,
        unnamed: str = "plain",
        format: PasskeyFormat | None = None,
    ) -> None:
        self.depths = check_passkeys(depths, keys_per_cell, seed)
        check_by(by, "passkey.by")
        self.keys_per_cell = keys_per_cell
        self.seed = seed
        self.by = by
        self.lengths = lengths
        self.methods = methods
        self.unnamed = unnamed
        self.format = format
        self.texts: Sequence[np.ndarray] | None = None

    @classmethod
    def of(cls, config: EvalConfig) -> PasskeyRetrieval:
        """Returns the task with the settings of an evaluation."""
        options = config.passkey
        return cls(
            depths=options.depths,
            keys_per_cell=options.keys_per_cell,
            seed=options.seed,
            by=options.by,
            lengths=options.lengths,
            methods=options.methods,
            unnamed=method_of(config.attention),
        )

    def prepare(self, subject: Subject, lengths: tuple[int, ...]) -> None:
        """Checks that keys fit into the shortest text: see Task.

        Raises:
            ValueError: if a length is too short for key, question and answer, the tokenizer cannot
                encode them, there is no text, or the model does not support the tokens.
        """
        super().prepare(subject, lengths)
        self._format = form = self.format or PasskeyFormat.of(subject.require_tokenizer(self.name))
        texts = self.texts
        if texts is None:
            texts = [document.input_ids for document in subject.documents]
        if lengths[0] < form.shortest:
            raise ValueError(
                f"passkey lengths must be at least {form.shortest}, the tokens of key, question "
                f"and answer, got {lengths[0]}. Leave it out."
            )
        self._window = trained_window(subject.model, subject.window)
        self._filler = Filler.of(texts, len(form.begin))
        numbers = np.random.default_rng(0)
        example = form.make(numbers, form.shortest, 0.0, self._filler, with_end=False)
        check_model(subject.model, [example.input_ids, *map(np.asarray, texts)], lengths[-1])

    def make(self, length: int) -> list[Hidden]:
        """Returns the keys of one length: see Task."""
        return [
            Hidden(length, depth, key) for depth in self.depths for key in range(self.keys_per_cell)
        ]

    def score(self, reader: Reader, length: int, made: Sequence[Hidden]) -> Iterator[Item]:
        """Yields whether a key is found, for every key: see Task."""
        found = self._generated if self.by == "generation" else self._decided
        for hidden, (one, answer) in zip(made, found(reader, length, made), strict=True):
            totals, columns = {"accuracy": float(one)}, {"depth": hidden.depth}
            yield Item(f"depth {hidden.depth} key {hidden.key}", totals, 1.0, columns, answer)

    def _decided(
        self, reader: Reader, length: int, made: Sequence[Hidden]
    ) -> Iterator[tuple[bool, str]]:
        """Yields whether greedy decoding gives each key, from one forward pass over many.

        The next pass is launched before the result of a pass is awaited.
        """
        size = max(1, reader.max_tokens // length)
        waiting: list[Callable[[], list[bool]]] = []
        for start in range(0, len(made), size):
            texts = [self._text(hidden) for hidden in made[start : start + size]]
            waiting.append(answered.launched(reader.model, texts, reader.segment, reader.device))
            if len(waiting) > 1:
                yield from _read(waiting.pop(0)(), reader)
        if waiting:
            yield from _read(waiting.pop()(), reader)

    def _generated(
        self, reader: Reader, length: int, made: Sequence[Hidden]
    ) -> Iterator[tuple[bool, str]]:
        """Yields whether the model generates each key, and what it generates."""
        tokenizer = self.subject.require_tokenizer(self.name)
        prompts = (self._prompt(tokenizer, hidden) for hidden in made)
        for answer in score_prompts(reader, tokenizer, prompts, "generation"):
            yield answer.strict == 1.0, answer.text

    def _prompt(self, tokenizer: Any, hidden: Hidden) -> TokenPrompt:
        text = self._text(hidden)
        prompt, answer = np.split(text.input_ids, [text.answer_start])
        key = tokenizer.decode(answer)
        return TokenPrompt(prompt, answer, Prompt("", (key.strip(),), "all", len(answer)))

    def size(self, length: int) -> int:
        """Returns the number of keys: see Task."""
        return len(self.depths) * self.keys_per_cell

    def table(self, results: Mapping[str, Mapping[int, Result]]) -> PasskeyTable:
        """Returns the number of keys found by method, length and depth: see Task."""
        found = {}
        for method, by_length in results.items():
            hits = [[i.totals["accuracy"] for i in result.items] for result in by_length.values()]
            cells = np.array(hits).reshape(len(by_length), len(self.depths), self.keys_per_cell)
            found[method or self.unnamed] = cells.sum(axis=-1).astype(np.int64)
        lengths = tuple(next(iter(results.values())))
        return PasskeyTable(
            found, lengths, self.depths, self.keys_per_cell, self._window, self.subject.name
        )

    def _text(self, hidden: Hidden) -> Passkey:
        """Returns the text of a key, whose random numbers do not depend on its depth."""
        numbers = np.random.default_rng([self.seed, hidden.length, hidden.key])
        return self._format.make(numbers, hidden.length, hidden.depth, self._filler, with_end=False)


def _read(right: Sequence[bool], reader: Reader) -> Iterator[tuple[bool, str]]:
    reader.advance(len(right))
    return ((one, "") for one in right)


def method_of(attention: AttentionConfig | None) -> str:
    """Returns the method to which an attention belongs: "dual_chunk", or "plain" for all others."""
    return "dual_chunk" if attention is not None and attention.name == "dual_chunk" else "plain"
