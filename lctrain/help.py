"""Makes the text of --help, and the configuration that --cfg job prints."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lctrain.composition import compose, flatten, group_choices

MOST_COLUMNS = 100
_INDENT = "      "
_MADE_OF_OTHERS = ("experiment", "debug")  # groups that only set values of other groups
_TARGET = "_target_"  # the class to build; --help shows it only if the schema describes it
_WORDS = {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}


@dataclass(frozen=True)
class Interface:
    """Interface of a console script: its name, configuration and help.

    Attributes:
        program: Name of the console script.
        config_name: Name of its primary configuration.
        summary: Purpose of the command, and examples of its use.
        unused: Dotted names of keys that the command does not read; --help leaves them out.
        only: Choices that the command accepts, by group. Groups that are not listed accept all.
    """

    program: str
    config_name: str
    summary: str
    unused: tuple[str, ...] = ()
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def describe(command: Interface, overrides: Sequence[str]) -> str:
    """Returns the help of a command: its purpose, the choices of each group, and the chosen keys.

    Args:
        command: Interface of the command.
        overrides: Overrides of the command line. The choices among them determine the listed keys.
    """
    config = compose(command.config_name, overrides, with_hydra=True)
    chosen = {
        name: choice
        for name, choice in config.hydra.runtime.choices.items()
        if not name.startswith("hydra/")
    }
    width = min(MOST_COLUMNS, shutil.get_terminal_size().columns)
    lines = [command.summary.strip(), "", "Groups, set by group=choice; * marks what is chosen:"]
    for group, options in group_choices(command.config_name, overrides).items():
        taken = [option for option in options if option in command.only.get(group, options)]
        names = [f"*{option}" if option == chosen.get(group) else option for option in taken]
        lines += textwrap.wrap(
            f"{group}: {', '.join(names)}",
            width,
            initial_indent="  ",
            subsequent_indent=_INDENT,
            break_on_hyphens=False,
        )
    lines += ["", "Keys, with their values and types; set by key=value:"]
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    for key, node in flatten(config).items():
        if key in command.unused or _is_branch(node):
            continue
        if key.rpartition(".")[2] == _TARGET and not _meaning(config, key):
            continue
        lines.append(f"  {key}={_value(config, key)}  ({_type(config, key)})")
        if words := _meaning(config, key):
            lines += textwrap.wrap(words, width, initial_indent=_INDENT, subsequent_indent=_INDENT)
    lines += [
        "",
        "--cfg job prints the whole configuration as a file; --multirun runs every combination of",
        "values that are separated by commas; --config-dir DIR adds a folder of your own files.",
    ]
    return "\n".join(lines)


def pasteable(command: Interface, overrides: Sequence[str]) -> str:
    """Returns the composed configuration as the text of a YAML file, the output of `--cfg job`.

    Saved as my.yaml and run with `--config-dir . --config-name my`, it composes to the same
    configuration.

    Args:
        command: Interface of the command.
        overrides: Overrides of the command line.
    """
    config = compose(command.config_name, overrides, with_hydra=True)
    choices = config.hydra.runtime.choices
    groups = {
        name: choice
        for name, choice in reversed(list(choices.items()))
        if "/" not in name and choice not in (None, "null") and name not in _MADE_OF_OTHERS
    }
    run = OmegaConf.create({"hydra": {"run": config.hydra.run, "sweep": config.hydra.sweep}})
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    head = [
        f"# {command.program} {' '.join(overrides)}".rstrip(),
        f"# As a file my.yaml: {command.program} --config-dir . --config-name my",
        "defaults:",
        f"  - {command.config_name}_schema",
        *(f"  - {name}: {choice}" for name, choice in groups.items()),
        "  - _self_",
        "",
    ]
    return "\n".join(head) + OmegaConf.to_yaml(config) + OmegaConf.to_yaml(run)


def attribute_docs(schema: type) -> dict[str, str]:
    """Returns the descriptions of all attributes, from the docstrings of a dataclass and its bases.

    Args:
        schema: Dataclass with Google-style docstrings.
    """
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        text = base.__dict__.get("__doc__") or ""
        _, marker, attributes = textwrap.dedent(text.replace("\n    ", "\n")).partition(
            "Attributes:\n"
        )
        if not marker:
            continue
        attributes = re.split(r"\n[A-Z]\w+:\n", attributes)[0]  # up to the next section
        for entry in re.split(r"\n(?=    \w+:)", "\n" + attributes):
            name, colon, words = entry.strip().partition(":")
            if colon and name.isidentifier():
                found[name] = " ".join(words.split())
    return found


def _is_branch(node: Any) -> bool:
    """Whether --help lists the keys inside a node, and not the node itself."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return False
    kind = OmegaConf.get_type(node)
    return kind is not None and (is_dataclass(kind) or len(node) > 0)


def _parent(config: DictConfig, key: str) -> tuple[Any, str]:
    path, _, name = key.rpartition(".")
    return (OmegaConf.select(config, path) if path else config), name


def _schema_of(config: DictConfig, key: str) -> tuple[type | None, str]:
    """Returns the dataclass that has a key (None if there is none), and the key's last part."""
    parent, name = _parent(config, key)
    kind = OmegaConf.get_type(parent)
    return (kind if is_dataclass(kind) else None), name


def _value(config: DictConfig, key: str) -> str:
    """Returns a key's value as on the command line, with interpolations unresolved."""
    parent, name = _parent(config, key)
    if OmegaConf.is_missing(parent, name):
        return "???"
    raw = OmegaConf.to_container(parent, resolve=False)[name]  # type: ignore[index, call-overload]
    if raw is None:
        return "null"
    if isinstance(raw, bool):
        return str(raw).lower()
    if isinstance(raw, list):
        return "[" + ",".join(map(str, raw)) + "]"
    return str(raw)


def _type(config: DictConfig, key: str) -> str:
    schema, name = _schema_of(config, key)
    if schema is None:
        parent, _ = _parent(config, key)
        return _words(type(parent.get(name)).__name__) if not _missing(parent, name) else "any"
    annotation = next(str(f.type) for f in fields(schema) if f.name == name)
    return _words(annotation)


def _missing(parent: Any, name: str) -> bool:
    return OmegaConf.is_missing(parent, name) or OmegaConf.is_interpolation(parent, name)


def _words(annotation: str) -> str:
    """Returns a type in words, such as "integer or null" for the annotation `int | None`."""
    parts = [part.strip() for part in annotation.replace("NoneType", "None").split("|")]
    words = []
    for part in parts:
        if match := re.fullmatch(r"(?:list|tuple|List|ListConfig)(?:\[(\w+).*\])?", part):
            words.append(f"list of {_WORDS.get(match[1], match[1])}s" if match[1] else "list")
        else:
            words.append({"None": "null", "Any": "any"}.get(part, _WORDS.get(part, part)))
    return " or ".join(words)


def _meaning(config: DictConfig, key: str) -> str:
    schema, name = _schema_of(config, key)
    return attribute_docs(schema).get(name, "") if schema is not None else ""
