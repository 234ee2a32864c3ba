"""The identity of a run: the options that a resumed run must not change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

MAY_CHANGE = (
    # Paths, loggers, and what happens after training.
    "name",
    "paths",
    "logger",
    "ckpt_path",
    "export",
    "show",
    "evaluation",
    "callbacks",  # built from the new options
    # length of the run, which determines the learning-rate schedule
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.budget_s",  # the checkpoint holds the number of steps that was chosen for it
    # intervals of logging and validation
    "trainer.log_every_n_steps",
    "trainer.validate_every_n_steps",
    "trainer.limit_val_batches",
    "trainer.enable_progress_bar",
    # the machine; the packs of an optimizer step of all ranks are checked with the data
    "trainer.accumulate_grad_batches",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.replicas",
    "trainer.context_parallel",
    "trainer.context_exchange",
    "trainer.deterministic",
    "attention.backend",
    "attention.deterministic",
    "attention.batch_invariant",
    # memory: results are the same to the bit, but not for another memory.mlp_tokens
    "memory.name",
    "memory.keep_attention",
    "memory.host_attention",
    "memory.keep_inputs",
    "memory.segment_layers",
    "memory.reuse_attention",
    "memory.backward_by_head",
    "memory.device_gib",
    "memory.host_gib",
    "memory.tokens",
    "memory.plan",
    "memory.reference",
    "adapter.merge",  # a step after training
    # paths of the data; a hash of the texts is compared with the checkpoint instead
    "data.files",
    "data.held_out_files",
    "data.tokenizer",
    "data.cache_dir",
    "data.num_workers",
    "data.num_proc",
)
"""Options, or groups of options, that a resumed run may change."""


def identity_of(config: Any, **resolved: Any) -> dict[str, Any]:
    """Returns the options that a resumed run must not change, as JSON values by dotted name.

    A group has the name of its dataclass: `{"data": "TextData", "data.max_tokens": 2048, ...}`.

    Args:
        config: Dataclass of the whole run.
        resolved: Values that replace those in `config`, by option name with `__` for a dot.
    """
    found: dict[str, Any] = {}
    _collect(config, "", found)
    found.update({name.replace("__", "."): value for name, value in resolved.items()})
    # NaN and infinities are None, as files of JSON give them back.
    text = json.dumps(found, default=str)
    return dict(json.loads(text, parse_constant=lambda _: None))


def plain_values(config: Any) -> dict[str, Any]:
    """Returns all options of a run as nested JSON values.

    Args:
        config: Dataclass of the whole run.
    """
    return dict(json.loads(json.dumps(asdict(config), default=str)))


def may_change(name: str) -> bool:
    """Whether a resumed run may change the option with this dotted name."""
    return any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE)


def differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """Returns how two runs' identities (see `identity_of`) differ: "option was x, is y".

    Options that are in only one of the identities are left out.

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
