"""make_task: builds the task that a name in `tasks` stands for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lctrain.config import TASKS
from lctrain.eval.task import Task

if TYPE_CHECKING:
    from lctrain.config import EvalConfig


def make_task(name: str, config: EvalConfig) -> Task:
    """Builds a task with the settings of an evaluation.

    Args:
        name: Name of one of lctrain's tasks, or of a task in `config.own_tasks`, which precedes.
        config: Settings of the evaluation.

    Raises:
        ValueError: if there is no task of this name, or its `_target_` does not make a Task.
    """
    own = config.own_tasks.get(name)
    if own is None:
        if name not in TASKS:
            known = ", ".join([*TASKS, *config.own_tasks])
            raise ValueError(
                f"tasks must be some of {known}, got [{name!r}]. Name a task of your own in "
                "own_tasks."
            )
        module, _, attribute = TASKS[name].rpartition(".")
        made: Task = getattr(import_module(module), attribute).of(config)
        return made
    from hydra.utils import instantiate

    task: Any = instantiate(own, _convert_="object")
    if not isinstance(task, Task):
        raise ValueError(
            f"own_tasks.{name}._target_ must be a lctrain.eval.Task, got one that makes a "
            f"{type(task).__name__}. Derive its class from Task."
        )
    task.name = name
    return task
