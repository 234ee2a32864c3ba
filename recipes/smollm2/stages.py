"""The stages that measure the fetched model: within its window and beyond it."""

from __future__ import annotations

import time
from typing import Any

from lctrain.config import NeedleConfig, RulerConfig
from lctrain.eval import METHODS
from lctrain.recipes.smollm2.experiment import Experiment, rows_of

ANSWERING = ("plain", "yarn", "dual_chunk", "dual_chunk_yarn")
"""Methods with which the model answers questions beyond its window."""


def measure_gain(experiment: Experiment) -> None:
    """Measures what longer contexts are worth, up to the window."""
    _measure_texts(experiment, "gain", "context_gain", experiment.scale.within)


def measure_beyond(experiment: Experiment) -> None:
    """Measures the loss beyond the window, by every method."""
    _measure_texts(
        experiment, "beyond", "perplexity", experiment.scale.beyond, methods=list(METHODS)
    )


def find_needles(experiment: Experiment) -> None:
    """Measures how many needles the model finds within its window."""
    _ask(experiment, "needle", "needle", experiment.scale.answers)


def find_needles_beyond(experiment: Experiment) -> None:
    """Measures how many needles the model finds beyond its window, by the methods."""
    lengths = experiment.scale.answers_beyond
    _ask(experiment, "needle_beyond", "needle", lengths, methods=list(ANSWERING))


def run_ruler(experiment: Experiment) -> None:
    """Measures RULER's synthetic tasks within the window."""
    _ask(experiment, "ruler", "ruler", experiment.scale.answers)


def document_tokens(longest: int, stride: int, strides: int) -> int:
    """Returns the tokens of a document whose last `strides` strides are scored.

    Each scored token has more than `longest - stride` tokens before it.
    """
    return longest + (strides - 1) * stride + 1


def _measure_texts(
    experiment: Experiment, stage: str, task: str, lengths: tuple[int, ...], **settings: Any
) -> None:
    scale = experiment.scale
    tokens = document_tokens(lengths[-1], scale.stride, scale.strides)
    settings |= {"documents": scale.documents, "document_tokens": tokens, "stride": scale.stride}
    _run(experiment, stage, task, lengths, **settings)


def _ask(
    experiment: Experiment, stage: str, task: str, lengths: tuple[int, ...], **settings: Any
) -> None:
    scale = experiment.scale
    questions = {
        "needle": NeedleConfig(depths=list(scale.depths), needles=scale.needles),
        "ruler": RulerConfig(
            tasks=None if scale.ruler_tasks is None else list(scale.ruler_tasks),
            items=scale.ruler_items,
        ),
    }
    settings |= {task: questions[task], "max_tokens": max(scale.answer_tokens, lengths[-1])}
    _run(experiment, stage, task, lengths, **settings)


def _run(
    experiment: Experiment, stage: str, task: str, lengths: tuple[int, ...], **settings: Any
) -> None:
    """Runs one task on the novels, prints its table, and writes the record of the stage."""
    started, resumed = time.perf_counter(), experiment.has_begun(stage)
    data = experiment.all_novels()
    settings |= {"tasks": [task], "window": experiment.scale.window, "lengths": list(lengths)}
    evaluation = experiment.evaluate(stage, data, **settings)
    print(evaluation, flush=True)
    content = {"window": experiment.scale.window, "rows": rows_of(evaluation, task)}
    experiment.save(stage, content, time.perf_counter() - started, resumed)
