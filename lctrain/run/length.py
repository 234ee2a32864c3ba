"""Compares the length of a resumed run with the steps that its checkpoint has taken."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.pluralize import pluralize
from lctrain.warn import warn_caller

if TYPE_CHECKING:
    from lctrain.config import TrainerConfig

NOTHING_LEFT = "Nothing is left to train"  # beginning of every warning
STEPS_KEY = "global_step"  # Lightning's key of a checkpoint's optimizer steps


def require_steps(step: int, max_steps: int, checkpoint: str) -> None:
    """Raises ValueError if `max_steps` of a resumed run is below its checkpoint's steps.

    Args:
        step: Optimizer steps that the checkpoint has taken.
        max_steps: Optimizer steps of the run; -1 for no limit.
        checkpoint: Name of the checkpoint, for the message.
    """
    if 0 <= max_steps < step:
        raise ValueError(
            f"trainer.max_steps must be at least {step}, the steps that {checkpoint} has taken, "
            f"got {max_steps}. Raise it to train on, or resume from an earlier checkpoint."
        )


def warn_if_ended(step: int, max_steps: int) -> None:
    """Warns if a resumed run will take no optimizer step; the warning names the caller's line.

    Args:
        step: Optimizer steps that the checkpoint has taken.
        max_steps: Optimizer steps of the run; -1 for no limit.

    Raises:
        ValueError: if `max_steps` is below `step`.
    """
    require_steps(step, max_steps, "the checkpoint")
    if step == max_steps:
        warn_caller(
            f"{NOTHING_LEFT}: the checkpoint has taken the {pluralize(step, 'step')} of "
            "trainer.max_steps. "
            "Raise it to train on."
        )


def nothing_left(config: TrainerConfig, checkpoint: Path) -> str | None:
    """Returns a warning if a resumed run will take no optimizer step.

    Args:
        config: Settings of the Trainer.
        checkpoint: Checkpoint that the run resumes from.

    Returns:
        The reason and the remedy; None if the run trains.

    Raises:
        ValueError: if `trainer.max_steps` is below the checkpoint's steps.
    """
    from lctrain.run.checkpoint_file import read_checkpoint

    state = read_checkpoint(checkpoint, map_location="cpu", mmap=True)
    step = int(state[STEPS_KEY])
    require_steps(step, config.max_steps, str(checkpoint))
    if step == config.max_steps:
        return _ended(checkpoint, f"the {pluralize(step, 'step')} of trainer.max_steps", "Raise it")
    if config.budget_s is not None and 0 < budget_steps(state) <= step:
        limit = (
            f"the {pluralize(budget_steps(state), 'step')} that the run chose for trainer.budget_s"
        )
        return _ended(checkpoint, limit, "Set trainer.budget_s=null")
    epochs = finished_epochs(state)
    if 0 <= config.max_epochs <= epochs:
        limit = f"{pluralize(epochs, 'epoch')}, and trainer.max_epochs is {config.max_epochs}"
        return _ended(checkpoint, limit, "Raise it")
    if config.max_time is not None and trained_time(state) >= _duration(config.max_time):
        return _ended(checkpoint, f"the whole trainer.max_time={config.max_time}", "Raise it")
    return None


def budget_steps(state: Mapping[str, Any]) -> int:
    """Returns the steps that StepBudget chose before a checkpoint; 0 if it chose none.

    Args:
        state: Contents of a checkpoint of Lightning.
    """
    return int(state.get("callbacks", {}).get("StepBudget", {}).get("max_steps") or 0)


def finished_epochs(state: Mapping[str, Any]) -> int:
    """Returns the number of passes over the data that a checkpoint has finished.

    Args:
        state: Contents of a checkpoint of Lightning.
    """
    loop = state["loops"]["fit_loop"]
    started, finished = (loop["epoch_progress"]["current"][name] for name in ("ready", "processed"))
    in_last_batch = started > finished and loop["epoch_loop.batch_progress"]["is_last_batch"]
    return int(finished) + bool(in_last_batch)


def trained_time(state: Mapping[str, Any]) -> timedelta:
    """Returns the training time that Lightning's Timer stored in a checkpoint; 0 without a Timer.

    Args:
        state: Contents of a checkpoint of Lightning.
    """
    timers = (s for name, s in state.get("callbacks", {}).items() if name.startswith("Timer"))
    seconds = (timer.get("time_elapsed", {}).get("train", 0.0) for timer in timers)
    return timedelta(seconds=max(seconds, default=0.0))


def _duration(text: str) -> timedelta:
    """Returns the time in a text `days:hours:minutes:seconds`."""
    days, hours, minutes, seconds = map(int, text.strip().split(":"))
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def _ended(checkpoint: Path, limit: str, remedy: str) -> str:
    return (
        f"{NOTHING_LEFT}: {checkpoint} has taken {limit}. Only the validation, the "
        f"export and the evaluation after training run again. {remedy} to train on."
    )
