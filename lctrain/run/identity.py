"""The identity of a run: the options that a resumed run must not change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

MAY_CHANGE = (
    # paths, loggers, and the steps after training
    "name",
    "paths",
    "logger",
    "ckpt_path",
    "export",
    "evaluation",
    "callbacks",  # built from the new options
    # length of the run, which the learning-rate schedule follows
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.budget_s",  # the number of steps that it led to is in the checkpoint
    # intervals of logging and validation
    "trainer.log_every_n_steps",
    "trainer.validate_every_n_steps",
    "trainer.limit_val_batches",
    "trainer.enable_progress_bar",
    # the machine; the number of ranks is checked with the data
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.deterministic",
    "attention.backend",
    "attention.deterministic",
    "model.gradient_checkpointing",
    # places of the data, whose contents are compared with the checkpoint
    "data.files",
    "data.held_out_files",
    "data.tokenizer",
    "data.cache_dir",
    "data.num_workers",
    "data.num_proc",
)
"""Options, or groups of them, that may differ between a checkpoint and the run that resumes it."""


def identity_of(config: Any, **resolved: Any) -> dict[str, Any]:
    """Returns the options that must stay, by dotted name, as plain values of JSON.

    The name of a group stands for its kind: `{"data": "TextData", "data.max_tokens": 2048, ...}`.

    Args:
        config: The dataclass of the whole run.
        resolved: Values to use instead of what the config says, by name with `__` for a dot.
    """
    found: dict[str, Any] = {}
    _collect(config, "", found)
    found.update({name.replace("__", "."): value for name, value in resolved.items()})
    return dict(json.loads(json.dumps(found, default=str)))


def plain_values(config: Any) -> dict[str, Any]:
    """Returns all options as nested values of JSON.

    Args:
        config: The dataclass of the whole run.
    """
    return dict(json.loads(json.dumps(asdict(config), default=str)))


def may_change(name: str) -> bool:
    """Whether the option of this dotted name may differ in a resumed run."""
    return any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE)


def differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """Returns the differences as "option was x, is y".

    Options that only one of the two has are left out.

    Args:
        now: Identity of this run.
        then: Identity of the run that is resumed.
    """
    found = []
    for name in now:
        if name not in then or now[name] == then[name] or may_change(name):
            continue
        if isinstance(now[name], dict) and isinstance(then[name], dict):
            for key in now[name] | then[name]:
                mine, theirs = (side[name].get(key, "not set") for side in (now, then))
                if mine != theirs:
                    found.append(f"{name}.{key} was {theirs!r}, is {mine!r}")
        else:
            found.append(f"{name} was {then[name]!r}, is {now[name]!r}")
    return found


def _collect(value: Any, prefix: str, found: dict[str, Any]) -> None:
    for field in fields(value):
        name = f"{prefix}{field.name}"
        if may_change(name):
            continue
        inner = getattr(value, field.name)
        if is_dataclass(inner):
            found[name] = type(inner).__name__
            _collect(inner, f"{name}.", found)
        else:
            found[name] = inner
