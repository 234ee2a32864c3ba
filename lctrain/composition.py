"""Composes a command's configuration without running it, for help and for messages about keys."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lctrain.schemas import SCHEMAS, register_schemas

CONFIGS = "lctrain.configs"


def compose(config_name: str, overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    """Composes the configuration of a command.

    Args:
        config_name: Name of the primary configuration.
        overrides: Overrides of the command line.
        with_hydra: Whether to keep the key `hydra`, which contains the chosen option of each group.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    register_schemas()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module(CONFIGS, version_base="1.3"):
        return hydra.compose(config_name, list(overrides), return_hydra_config=with_hydra)


def group_choices(config_name: str, overrides: Sequence[str]) -> dict[str, list[str]]:
    """Returns the choices of every config group, without schemas and without Hydra's own groups.

    Args:
        config_name: Name of the primary configuration.
        overrides: Overrides of the command line.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.object_type import ObjectType

    register_schemas()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module(CONFIGS, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        chosen = hydra.compose(config_name, list(overrides), return_hydra_config=True)
        choices = reversed(list(chosen.hydra.runtime.choices))  # in the order of the defaults list
        groups = [name for name in choices if not name.startswith("hydra/")]
        return {
            group: [
                option
                for option in loader.get_group_options(group, ObjectType.CONFIG)
                if not option.endswith("_schema")
            ]
            for group in groups
        }


def known_keys(config_name: str, overrides: Sequence[str]) -> list[str]:
    """Returns all keys of a command: its groups, and the keys of all choices of these groups.

    Args:
        config_name: Name of the primary configuration.
        overrides: Overrides of the command line. Only valid choices of groups are applied.

    Returns:
        Dotted names. A key of a choice that is not in use has the choice before it, such as
        data=text:data.files.
    """
    groups = group_choices(config_name, ())
    chosen = [
        override
        for override in overrides
        if (pair := override.partition("="))[0] in groups and pair[2] in groups[pair[0]]
    ]
    keys = flatten(compose(config_name, chosen))
    return [*groups, *keys, *keys_of_other_choices(keys)]


def keys_of_other_choices(keys: Container[str]) -> list[str]:
    """Returns the keys of choices that are not in use, such as data=text:data.files.

    Args:
        keys: Dotted names of the keys in use.
    """
    found = []
    for name, schema in SCHEMAS.items():
        group, _, choice = name.partition("/")
        if group not in ("data", "model", "adapter", "attention"):
            continue
        choice = {"pretrained": "hf", "scratch": "tiny", "adapter": "lora"}.get(choice, choice)
        found += [
            f"{group}={choice}:{group}.{field.name}"
            for field in fields(schema)
            if f"{group}.{field.name}" not in keys
        ]
    return found


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the nodes of a nested configuration by dotted name, branches and leaves.

    Interpolations are not resolved. The node of a mandatory value that is not set is None.

    Args:
        node: Configuration to flatten.
        prefix: Text before every name.
    """
    found: dict[str, Any] = {}
    for key in node:
        name = f"{prefix}{key}"
        if OmegaConf.is_missing(node, key):
            found[name] = None
            continue
        child = node._get_node(key)
        found[name] = child
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_interpolation()):
            found |= flatten(child, f"{name}.")
    return found
