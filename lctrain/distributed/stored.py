"""read_stored: fills sharded parameters from safetensors files; each rank reads its own slices."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystem

_MARK = "_lctrain_stored"  # attribute of a parameter


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: The file.
        name: Name of the tensor in the file.
    """

    file: Path
    name: str


def mark_stored(parameter: nn.Parameter, stored: StoredTensor) -> None:
    """Marks a parameter on device meta as one whose value is in a safetensors file."""
    setattr(parameter, _MARK, stored)


def stored_of(parameter: nn.Parameter) -> StoredTensor | None:
    """Returns the place of a parameter's value; None if the value is not in a file."""
    stored: StoredTensor | None = getattr(parameter, _MARK, None)
    return stored


def read_stored(values: Mapping[StoredTensor, Any]) -> None:
    """Reads tensors from safetensors files into DTensors, in place. All ranks must call it.

    Every rank reads the slices of its shards only, and converts them to the dtype of the DTensor.

    Args:
        values: A DTensor of the stored tensor's shape for every tensor to read.
    """
    if values:
        reader = _FilesReader(sorted({str(stored.file) for stored in values}))
        dcp.load({stored.name: value for stored, value in values.items()}, storage_reader=reader)


class _FilesReader(dcp.HuggingFaceStorageReader):
    """Reader of some safetensors files of a folder, which may hold other copies of the weights."""

    def __init__(self, files: list[str]) -> None:
        super().__init__(str(Path(files[0]).parent))
        self.fs = _Files(files)


class _Files(FileSystem):
    """A file system whose folder lists given files only."""

    def __init__(self, files: Iterable[str]) -> None:
        super().__init__()
        self.files = list(files)

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return self.files
