"""The folders that a run writes to, and the path options of every group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lctrain.config.schema import MISSING
from lctrain.local_paths import local_path


@dataclass(frozen=True)
class PathsConfig:
    """Folders that a run writes to. They must be local, since a run locks its folder.

    Attributes:
        root: Folder of all runs.
        runs_dir: Folder of all runs with this name. `ckpt_path=last` looks for checkpoints in it.
        output_dir: Folder of this run.
    """

    root: str = "outputs"
    runs_dir: str = MISSING
    output_dir: str = MISSING

    def __post_init__(self) -> None:
        expand_paths(self, "paths.", "root", "runs_dir", "output_dir")


def expand_paths(config: Any, group: str, *names: str) -> None:
    """Expands `~` in the paths of a frozen config; raises ValueError for a URL.

    Args:
        config: Frozen dataclass, whose attributes are changed in place.
        group: Prefix of the options in messages, such as "paths.".
        *names: Names of the attributes that hold paths.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value != MISSING:
            object.__setattr__(config, name, local_path(f"{group}{name}", value))
