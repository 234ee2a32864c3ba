"""Checks names of runs and paths on this machine's file systems, and finds the cache."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath

SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:/")
LONGEST_NAME = 255  # bytes of the longest folder name on common file systems


def check_run_name(name: str) -> str:
    """Checks and returns the name of a run, which becomes one or more folders below paths.root.

    Raises:
        ValueError: if the name is not a valid folder name, or leads out of paths.root.
    """
    parts = PurePath(name).parts
    inside = name.strip() == name and name != "" and not name.startswith(("/", "~"))
    plain = all(
        part not in (".", "..") and part.isprintable() and len(part.encode()) <= LONGEST_NAME
        for part in name.split("/")
    )
    if not (inside and plain and parts and all(name.split("/"))) or "\\" in name or ":/" in name:
        raise ValueError(
            f"name must be a folder's name without .., got {name!r}. It is a part of the run's "
            "folder; paths.root says where the folders are."
        )
    return name


def local_path(key: str, path: str) -> str:
    """Checks and returns a path on this machine, with `~` expanded.

    URLs are refused: a run locks its folder, and appends to, flushes and renames its files, which
    object stores do not support.

    Args:
        key: Name of the option, for the message.
        path: Path that the user gave.

    Raises:
        ValueError: if the path is empty or a URL, or names the home folder of an unknown user.
    """
    if SCHEME.match(path):
        raise ValueError(
            f"{key} must be a folder or file of this machine, got the URL {path!r}. A run locks, "
            "appends to and renames its files, which object stores cannot: run here, and copy the "
            "folder afterwards (with aws s3 sync, gsutil rsync or fsspec), or mount the store."
        )
    if not path.strip() or "\0" in path:
        raise ValueError(f"{key} must be a path, got {path!r}. Give a folder's name.")
    return str(PurePath(path)) if not path.startswith("~") else _expanded(key, path)


def _expanded(key: str, path: str) -> str:
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(
            f"{key} must begin with the home folder of a user there is, got {path!r}. Write the "
            "whole path."
        ) from error


def cache_folder(given: str | os.PathLike[str] | None) -> Path:
    """Returns the cache folder.

    The first that is set is used: the given folder, $LCTRAIN_CACHE, $XDG_CACHE_HOME/lctrain,
    ~/.cache/lctrain.
    """
    if given is not None:
        return Path(given).expanduser()
    if folder := os.environ.get("LCTRAIN_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lctrain"
