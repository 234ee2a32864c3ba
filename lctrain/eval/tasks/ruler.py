"""The task ruler: RULER's synthetic tasks, each by length."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from lctrain.eval.ahead import MOST_THREADS, called_ahead
from lctrain.eval.answers import MEASURES, score_prompts
from lctrain.eval.kept_prompts import KeptPrompts
from lctrain.eval.limits import check_model
from lctrain.eval.prompt import Prompt, TokenPrompt, fitting_units, tokenized, tokens_of
from lctrain.eval.reader import Reader
from lctrain.eval.records import Item, Subject
from lctrain.eval.ruler.counting import CommonWords, FrequentWords
from lctrain.eval.ruler.family import Family
from lctrain.eval.ruler.needles import Needles
from lctrain.eval.ruler.questions import Questions, read_questions
from lctrain.eval.ruler.tracking import VariableTracking
from lctrain.eval.task import Task
from lctrain.limits import RULER_TASKS, check_ruler, require

if TYPE_CHECKING:
    from lctrain.config import EvalConfig

from lctrain.warn import warn_once

log = logging.getLogger(__name__)

MOST_AHEAD = 2**23
"""Most tokens of the prompts of the next length that are made while a model answers."""


class PromptTooLongError(ValueError):
    """The smallest prompt of a task, with its answer, does not fit into a length.

    Args:
        task: Name of the task.
        tokens: Tokens of prompt and answer.
        length: The length in tokens.
    """

    def __init__(self, task: str, tokens: int, length: int) -> None:
        super().__init__(
            f"lengths must be at least {tokens} for {task} with this tokenizer, got {length}. "
            "Leave it out, or choose others by ruler.tasks."
        )
        self.tokens = tokens


class Ruler(Task):
    """RULER's synthetic tasks (arXiv 2404.06654). Its items are prompts.

    Every prompt is tokenized once, and kept for further methods and evaluations.

    Args:
        tasks: Names of the tasks, some of RULER_TASKS; None for all but qa.
        items: Number of prompts of each task at each length.
        seed: Seed of the prompts.
        by: "generation", or "likelihood" of the answer for base models.
        questions: File of JSON lines for the task qa.
        lengths: Lengths in tokens, answer included; None for those of the evaluation.
        methods: Methods to compare; None for those of the evaluation.
    """

    name = "ruler"
    measures: ClassVar = MEASURES
    title: ClassVar = "RULER"
    unit: ClassVar = "prompt"

    def __init__(
        self,
        *,
        tasks: Sequence[str] | None = None,
        items: int = 10,
        seed: int = 0,
        by: str = "generation",
        questions: str | None = None,
        lengths: Sequence[int] | None = None,
        methods: Sequence[str] | None = None,
    ) -> None:
        self.tasks = check_ruler(tasks, items, seed, by, questions)
        self.items = items
        self.seed = seed
        self.by = by
        self.lengths = lengths
        self.methods = methods
        self.entries = () if questions is None else read_questions(questions)
        self._lengths: tuple[int, ...] = ()
        self._units: dict[tuple[str, int], int] = {}
        self._kept = KeptPrompts()
        self._made_for: tuple[Any, Any] = (None, None)

    @classmethod
    def of(cls, config: EvalConfig) -> Ruler:
        """Returns the task with the settings of an evaluation."""
        o = config.ruler
        return cls(
            tasks=o.tasks,
            items=o.items,
            seed=o.seed,
            by=o.by,
            questions=o.questions,
            lengths=o.lengths,
            methods=o.methods,
        )

    def prepare(self, subject: Subject, lengths: tuple[int, ...]) -> None:
        """Checks that every prompt, at its smallest, fits into the shortest length: see Task.

        Raises:
            ValueError: if a prompt does not fit, or the tokenizer cannot represent an answer.
        """
        self._kept.settle()  # prompts of a run that was stopped
        super().prepare(subject, lengths)
        self._lengths = lengths
        made_for = (subject.require_tokenizer(self.name), subject.documents)
        if any(new is not old for new, old in zip(made_for, self._made_for, strict=True)):
            self._units.clear()
            self._kept.clear()
            self._made_for = made_for
        in_text = any(haystack == "text" for haystack, _ in self._haystacks())
        text = self._text() if in_text else []
        require(
            bool(text) or not in_text,
            "ruler must hide needles in text, got documents without a word. Use more data.",
        )
        self._families = families(text, self.entries)
        made, too_long = self._smallest(lengths[0])
        for prompt in made:
            check_model(subject.model, [prompt.input_ids, prompt.answer_ids], lengths[-1])
        if too_long:
            names, length = ", ".join(too_long), lengths[0]
            while too_long:  # the prompts of another length differ by some tokens
                length = max(too_long.values())
                _, too_long = self._smallest(length)
            raise ValueError(
                f"lengths must be at least {length} for {names} with this tokenizer, got "
                f"{lengths[0]}. Leave it out, or choose others by ruler.tasks."
            )

    def _smallest(self, length: int) -> tuple[list[TokenPrompt], dict[str, int]]:
        """Returns the smallest prompts that fit, and the tokens that each other task needs."""
        made: list[TokenPrompt] = []
        too_long: dict[str, int] = {}
        for name, number in self.make(length):
            try:
                made.append(self._fitted(name, length, number, self._families[name].smallest))
            except PromptTooLongError as error:
                too_long[name] = max(error.tokens, too_long.get(name, 0))
        return made, too_long

    def make(self, length: int) -> list[tuple[str, int]]:
        """Returns the names of the tasks with the numbers of the prompts: see Task."""
        return [(name, number) for name in self.tasks for number in range(self.items)]

    def score(self, reader: Reader, length: int, made: Sequence[tuple[str, int]]) -> Iterator[Item]:
        """Yields the score of every prompt: see Task."""
        prompts = self._prompts(made, length)
        try:
            answers = score_prompts(reader, self.subject.tokenizer, prompts, self.by)
            for (name, number), answer in zip(made, answers, strict=True):
                columns = {"task": name}
                yield Item(f"{name} {number}", answer.totals, 1.0, columns, answer.text)
        except BaseException:
            # A program that ends now would wait until all prompts of the next length are made.
            self._kept.settle()
            raise

    def size(self, length: int) -> int:
        """Returns the number of prompts: see Task."""
        return len(self.tasks) * self.items

    def _prompts(self, made: Sequence[tuple[str, int]], length: int) -> Iterator[TokenPrompt]:
        """Yields the prompts of a length, and then begins with those of the next one."""
        self._kept.settle()
        names, functions = self._functions(made, length)
        found = called_ahead(functions, MOST_THREADS)  # score_prompts keeps more
        with closing(found):
            yield from islice(found, names, None)  # type: ignore[misc]
        following = next((longer for longer in self._lengths if longer > length), None)
        if following is not None and len(made) * following <= MOST_AHEAD:
            self._kept.fill(self._functions(made, following)[1])

    def _functions(
        self, made: Sequence[tuple[str, int]], length: int
    ) -> tuple[int, list[Callable[[], TokenPrompt | None]]]:
        """Returns functions that make prompts; the first ones, as many as returned, fit the tasks.

        Prompts wait until their task is fitted, so threads must call the functions in their order.
        """
        fitted = {name: threading.Event() for name, _ in made}

        def fit(name: str) -> None:
            try:
                self._fit(name, length)
            finally:
                fitted[name].set()

        def prompt(name: str, number: int) -> TokenPrompt:
            fitted[name].wait()
            return self.prompt(name, length, number)

        functions: list[Callable[[], TokenPrompt | None]] = [partial(fit, name) for name in fitted]
        return len(functions), functions + [partial(prompt, *one) for one in made]

    def prompt(self, name: str, length: int, number: int) -> TokenPrompt:
        """Returns a prompt that fills a length, its answer included.

        Args:
            name: Name of the task.
            length: Length in tokens.
            number: Number of the prompt.
        """
        key = (name, length, number)
        if (kept := self._kept.get(key)) is not None:
            return kept
        self._fit(name, length)
        made = self._fitted(name, length, number, self._units[name, length])
        self._kept.add(key, made)
        return made

    def _fit(self, name: str, length: int) -> None:
        """Finds how many units of a task fill a length, unless they are known."""
        if (name, length) in self._units:
            return
        family = self._families[name]
        first = self._fitted(name, length, 0, family.smallest)
        self._units[name, length] = fitting_units(
            lambda units: self._tokens(family.build(units, self._numbers(name, length, 0))),
            length - first.new_tokens,
            family.smallest,
            name,
            first.new_tokens,
        )
        self._count_repeats(name, length)

    def _fitted(self, name: str, length: int, number: int, units: int) -> TokenPrompt:
        """Returns a prompt of at most `units` units that fits into a length."""
        family = self._families[name]
        while True:
            prompt = family.build(units, self._numbers(name, length, number))
            made = tokenized(self.subject.tokenizer, prompt)
            room = length - made.new_tokens
            over = len(made.input_ids) - room
            if over <= 0:
                return made
            if units <= family.smallest:
                raise PromptTooLongError(name, len(made.input_ids) + made.new_tokens, length)
            per_unit = max(1.0, len(made.input_ids) / units)
            units = max(family.smallest, units - max(1, int(over / per_unit)))

    def _numbers(self, name: str, length: int, number: int) -> random.Random:
        return random.Random(f"{self.seed} {name} {length} {number}")

    def _tokens(self, prompt: Prompt) -> int:
        return len(tokens_of(self.subject.tokenizer, prompt.text))

    def _text(self) -> list[str]:
        """Returns the words of the documents."""
        decode: Any = self.subject.tokenizer.decode
        texts = [decode(d.input_ids, skip_special_tokens=True) for d in self.subject.documents]
        return [word for text in texts for word in text.split()]

    def _haystacks(self) -> list[tuple[str, str]]:
        found = families(("word",), self.entries)
        return [
            (family.haystack, name)
            for name in self.tasks
            if isinstance(family := found[name], Needles)
        ]

    def _count_repeats(self, name: str, length: int) -> None:
        """Warns if the text is shorter than a prompt."""
        family, units = self._families[name], self._units[name, length]
        if isinstance(family, Needles) and family.haystack == "text" and units > len(family.text):
            warn_once(
                log,
                "%s repeats its text at length %s: the documents hold %s words, and a prompt %s. "
                "Use more documents.",
                name,
                f"{length:,}",
                f"{len(family.text):,}",
                f"{units:,}",
            )


def families(text: Sequence[str], entries: Sequence[Any]) -> dict[str, Family]:
    """Returns RULER's tasks by name.

    Args:
        text: Words of the haystacks of text.
        entries: Questions of the task qa.
    """
    made: dict[str, Family] = {
        "niah_single_1": Needles(),
        "niah_single_2": Needles("text", text=text),
        "niah_single_3": Needles("text", values="uuids", text=text),
        "niah_multikey_1": Needles("text", hidden=4, text=text),
        "niah_multikey_2": Needles("needles"),
        "niah_multikey_3": Needles("needles", keys="uuids", values="uuids"),
        "niah_multivalue": Needles("text", per_key=4, text=text),
        "niah_multiquery": Needles("text", asked=4, text=text),
        "vt": VariableTracking(),
        "cwe": CommonWords(),
        "fwe": FrequentWords(),
        "qa": Questions(entries),
    }
    assert tuple(made) == RULER_TASKS
    return made
