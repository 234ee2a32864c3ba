"""Registers schemas in Hydra's ConfigStore, and converts composed configurations to dataclasses."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lctrain.config_errors import explain_config_error
from lctrain.instances import require_instance

if TYPE_CHECKING:
    from omegaconf import DictConfig

Schema = TypeVar("Schema")

MISSING: Any = "???"  # OmegaConf's mark of a mandatory value that is not set


def store_schema(name: str, schema: Any) -> None:
    """Registers one dataclass in Hydra's ConfigStore as `<name>_schema`.

    OmegaConf marks the nodes of frozen dataclasses as read-only, which would keep Hydra from
    applying YAML files and overrides. The mark is therefore removed here; `to_dataclass` returns
    frozen dataclasses again.

    Args:
        name: "group/name", or "name" for the schema of a primary config.
        schema: A dataclass.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    require_instance("name", name, str, 'Pass "group/name", or "name".')
    if not is_dataclass(schema):
        raise TypeError(f"schema must be a dataclass, got {schema!r}. Decorate a class.")
    node = OmegaConf.structured(schema)
    _allow_overrides(node)
    group, _, leaf = name.rpartition("/")
    ConfigStore.instance().store(group=group or None, name=f"{leaf}_schema", node=node)


def to_dataclass(config: DictConfig, schema: type[Schema]) -> Schema:
    """Converts a composed configuration into its dataclass, with all interpolations resolved.

    Args:
        config: Configuration that Hydra composed on top of a stored schema.
        schema: The dataclass of the root.

    Returns:
        The dataclass; no value inside it is an OmegaConf container.

    Raises:
        ValueError: if a mandatory value is missing, a key is unknown or a type does not fit; the
            message names the key.
    """
    from dataclasses import FrozenInstanceError

    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    require_instance("config", config, DictConfig, "Pass what Hydra composed.")
    require_instance("schema", schema, type, "Pass a dataclass.")
    try:
        result = OmegaConf.to_object(config)
    except FrozenInstanceError as error:  # a key appended with + to a schema without it
        key = str(error).split("'")[1]
        raise ValueError(
            f"{key} must be a key of the configuration, got one that it does not have. Leave it "
            "out."
        ) from error
    except OmegaConfBaseException as error:
        raise ValueError(explain_config_error(error)) from error
    if not isinstance(result, schema):
        raise ValueError(
            f"config must be built on {schema.__name__}, got {type(result).__name__}. List its "
            "schema in the defaults."
        )
    return result


def _allow_overrides(node: DictConfig) -> None:
    """Removes the read-only flag of frozen dataclasses from a node and its children."""
    from omegaconf import DictConfig

    node._set_flag("readonly", None)
    if node._is_none() or node._is_missing():
        return
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _allow_overrides(child)
