"""The task harness: tasks of lm-evaluation-harness, with lctrain's attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from lctrain.eval.harness import PACKAGE, harness_model
from lctrain.eval.reader import Reader
from lctrain.eval.records import Item, Measure
from lctrain.eval.task import Task
from lctrain.limits import require

if TYPE_CHECKING:
    from lctrain.config import EvalConfig


class Harness(Task):
    """Tasks of lm-evaluation-harness. Its items are their documents.

    A length is the largest number of tokens of a prompt with its answer; the harness cuts longer
    prompts from the left.

    Args:
        tasks: Names of tasks of the harness.
        include_path: Folder with tasks of your own as the harness reads them; None for none.
        limit: Largest number of documents of each task; None for all.
        batch_size: Number of prompts in a forward pass.
        lengths: Lengths in tokens; None for those of the evaluation.
        methods: Methods to compare; None for those of the evaluation.
    """

    name = "harness"
    measures: ClassVar = (Measure("score", "Score of the harness"),)
    title: ClassVar = "lm-evaluation-harness"
    unit: ClassVar = "document"
    shares_itself: ClassVar = True  # all ranks run all tasks, each of which has several items

    def __init__(
        self,
        *,
        tasks: Sequence[str],
        include_path: str | None = None,
        limit: int | None = None,
        batch_size: int = 1,
        lengths: Sequence[int] | None = None,
        methods: Sequence[str] | None = None,
    ) -> None:
        require(
            len(tasks) > 0,
            "harness.tasks must name at least one task of lm-evaluation-harness, got none. Name "
            "some, or leave harness out of tasks.",
        )
        self.tasks = list(tasks)
        self.include_path = include_path
        self.limit = limit
        self.batch_size = batch_size
        self.lengths = lengths
        self.methods = methods

    @classmethod
    def of(cls, config: EvalConfig) -> Harness:
        """Returns the task with the settings of an evaluation."""
        o = config.harness
        return cls(
            tasks=o.tasks,
            include_path=o.include_path,
            limit=o.limit,
            batch_size=o.batch_size,
            lengths=o.lengths,
            methods=o.methods,
        )

    def make(self, length: int) -> Sequence[str]:
        """Returns the names of the tasks: see Task."""
        return self.tasks

    def score(self, reader: Reader, length: int, made: Sequence[str]) -> Iterator[Item]:
        """Yields the scores of all documents: see Task.

        Raises:
            ValueError: if lm_eval is not installed, or documents are cut into parts.
        """
        require(
            reader.segment is None,
            "methods must not name intra_chunk for harness. Leave it out.",
        )
        with harness_model(
            reader.model,
            self.subject.tokenizer,
            None,
            max_length=length,
            batch_size=self.batch_size,
        ) as lm:
            found = self._evaluate(lm)
        for name, samples in found["samples"].items():
            for sample in samples:
                yield from _items(name, sample)
        reader.advance(len(made))

    def size(self, length: int) -> int:
        """Returns the number of tasks: see Task."""
        return len(self.tasks)

    def _evaluate(self, lm: Any) -> Any:
        manager = import_module(f"{PACKAGE}.tasks").TaskManager(include_path=self.include_path)
        return import_module(PACKAGE).simple_evaluate(
            model=lm,
            tasks=self.tasks,
            task_manager=manager,
            limit=self.limit,
            log_samples=True,
            bootstrap_iters=0,
        )


def _items(name: str, sample: dict[str, Any]) -> Iterator[Item]:
    """Yields an item for each metric of a document that is a number."""
    for metric in sample.get("metrics", ()):
        value = sample.get(metric)
        if isinstance(value, (bool, int, float)):
            columns = {"task": name, "metric": metric}
            yield Item(f"{name} {sample['doc_id']} {metric}", {"score": float(value)}, 1.0, columns)
