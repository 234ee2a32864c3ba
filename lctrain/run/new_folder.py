"""Chooses the path of a new run's folder for Hydra: outputs/<name>/<time>_<four digits>/."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

from lctrain.local_paths import check_run_name, local_path
from lctrain.run.rank import is_rank_zero

_digits = secrets.token_hex(2)  # different for runs that start in the same second


def begin_command() -> None:
    """Draws new digits for the folders of the next command in this process."""
    global _digits
    _digits = secrets.token_hex(2)


def new_run_folder(root: str, name: str, time: str) -> str:
    """Returns the path of a new run's folder, without creating the folder.

    Args:
        root: Folder of all runs.
        name: Name of the run.
        time: Start of the run, as text.

    Raises:
        ValueError: if the name leads out of the root, or the root is a URL.
    """
    below = Path(local_path("paths.root", root)) / check_run_name(name)
    if not is_rank_zero():
        # Hydra creates a folder for every rank of torchrun or srun; only rank 0's is used.
        below = Path(tempfile.gettempdir()) / f"lctrain-{os.getuid()}"
    return str(below / f"{time}_{_digits}")


def register_new_run_folder() -> None:
    """Registers the OmegaConf resolver ${new_run_folder:root,name,time}. It is idempotent."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("new_run_folder", _resolve, replace=True)


def _resolve(root: Any, name: Any, time: Any) -> str:
    return new_run_folder(str(root), str(name), str(time))
