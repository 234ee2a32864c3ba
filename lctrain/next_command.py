"""Makes the arguments for `lctrain-eval` to read the held-out text of a training run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from lctrain.config import EvalConfig, TrainConfig
from lctrain.schemas import SCHEMAS

# Settings that an evaluation does not read: those of tokenizing, rows and the cache folder.
NOT_OF_TEXTS = frozenset(
    {
        "vocab_size",
        "max_tokens",
        "max_document_tokens",
        "overlong",
        "packing_window",
        "balance_window",
        "passkey_fraction",
        "mask_fraction",
        "num_workers",
        "num_proc",
        "seed",
        "cache_dir",
        "tokenizer",
    }
)
_KEYWORDS = frozenset({"null", "true", "false", "nan", "inf"})  # of Hydra
_PLAIN = re.compile(r"[\w./][\w./*?-]*", re.ASCII)


def evaluation_arguments(config: TrainConfig) -> list[str]:
    """Returns the arguments of `lctrain-eval`, except the model, for the held-out text of a run.

    They set the data and the size of the evaluation, where the run's settings differ from the
    defaults of `lctrain-eval`. Without them, `lctrain-eval` could read text that the run trained
    on.

    Args:
        config: Configuration of the run.

    Returns:
        Arguments in Hydra's grammar, quoted for a shell; [] for data without a config in Hydra.
    """
    arguments = []
    choices = [name for name, schema in SCHEMAS.items() if schema is type(config.data)]
    if not choices:
        return []
    choice = choices[0].removeprefix("data/")
    if choice != "stdlib":
        arguments.append(f"data={choice}")
    for field in fields(config.data):
        value = getattr(config.data, field.name)
        if field.name not in NOT_OF_TEXTS and value != _default(field):
            # The keys of a mapping are not in the schema.
            new = "+" if isinstance(_default(field), Mapping) else ""
            arguments.append(f"{new}data.{field.name}={_hydra(value)}")
    if config.evaluation.enabled:
        for field in fields(EvalConfig):
            if field.name in ("documents", "document_tokens", "lengths"):
                value = getattr(config.evaluation, field.name)
                if value != _default(field):
                    arguments.append(f"{field.name}={_hydra(value)}")
    return [shlex.quote(argument) for argument in arguments]


def pasteable(key: str, value: Any) -> str:
    """Returns `key=value` in Hydra's grammar, quoted for a shell."""
    return shlex.quote(f"{key}={_hydra(value)}")


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _hydra(value: Any) -> str:
    """Returns a value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_hydra(item)}' for key, item in value.items())}}}"
    if isinstance(value, str) and (not _PLAIN.fullmatch(value) or value in _KEYWORDS):
        # Hydra takes a backslash as it is, except in front of a quote.
        escaped = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + '\\"' * bool(found[2]), value)
        return f'"{escaped}"'
    return str(value)
