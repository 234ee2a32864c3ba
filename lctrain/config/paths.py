"""The folders that a run writes to, and the path options of every group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lctrain.config.schema import MISSING
from lctrain.local_paths import local_path


@dataclass(frozen=True)
class PathsConfig:
    """Folders that a run writes into. They are on this machine, since a run locks them.

    Attributes:
        root: Folder of all runs.
        runs_dir: Folder of the runs of this name; `ckpt_path=last` looks for this run there.
        output_dir: Folder of this run alone.
    """

    root: str = "outputs"
    runs_dir: str = MISSING
    output_dir: str = MISSING

    def __post_init__(self) -> None:
        expand_paths(self, "paths.", "root", "runs_dir", "output_dir")


def expand_paths(config: Any, group: str, *names: str) -> None:
    """Expands `~` in the path options of a frozen config, and refuses URLs."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value != MISSING:
            object.__setattr__(config, name, local_path(f"{group}{name}", value))
