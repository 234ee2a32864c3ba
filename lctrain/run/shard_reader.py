"""Reads sharded checkpoints without running code from their files.

torch.distributed.checkpoint unpickles the file `.metadata` and all values that are not tensors, and
pickles can run code. The readers here accept only the classes that a checkpoint needs.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

METADATA = ".metadata"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
}
_MODULES = {"pathlib._local": "pathlib"}  # name of the module in Python 3.13


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler that accepts only the classes of a checkpoint's metadata."""

    def find_class(self, module: str, name: str) -> Any:
        module = _MODULES.get(module, module)
        known = name in _CLASSES.get(module, ())
        if not known and not (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class ShardReader(dcp.FileSystemReader):
    """Reader of a folder of shards whose `.metadata` holds plain values and known classes only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        """Reads `.metadata`, and raises ValueError if it holds another class or is damaged."""
        path = Path(self.path) / METADATA
        with path.open("rb") as file:
            try:
                loaded = _MetadataUnpickler(file).load()
            except pickle.UnpicklingError as error:
                raise _more_than_values(path, str(error)) from None
            except (
                EOFError,
                AttributeError,
                ImportError,
                IndexError,
                KeyError,
                TypeError,
            ) as error:
                raise _more_than_values(path, type(error).__name__) from error
        if not isinstance(loaded, dcp_metadata.Metadata):
            raise _more_than_values(path, type(loaded).__name__)
        if loaded.storage_meta is None:
            loaded.storage_meta = dcp_metadata.StorageMeta()
        loaded.storage_meta.load_id = self.load_id
        return loaded


class _PlainValues(DefaultLoadPlanner):
    """Load planner that accepts only plain values for the entries that are not tensors."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            lines = str(error).splitlines()
            reason = next((line for line in lines if "GLOBAL" in line), lines[0])
            raise _more_than_values(read_item.dest_index.fqn, reason.strip()) from None
        value.seek(0)
        super().load_bytes(read_item, value)


class _AllPlainValues(_PlainValues, _EmptyStateDictLoadPlanner):
    """Load planner that reads every value of a checkpoint, and accepts only plain values."""


def read_shards(path: Path, state: dict[str, Any]) -> None:
    """Reads this rank's shards into a state, in place. All ranks must call it.

    Args:
        path: Folder of the checkpoint.
        state: Values to fill in, by name; nested dictionaries with DTensors are allowed.

    Raises:
        ValueError: if the checkpoint holds more than tensors and plain values.
    """
    reader = ShardReader(path)
    reader.read_metadata()  # raises errors that torch would hide in its own call
    with _own_errors():
        dcp.load(state, storage_reader=reader, planner=_PlainValues())


def shapes_in(path: Path, prefix: str) -> dict[str, torch.Size]:
    """Returns the shapes of the tensors of a checkpoint whose names begin with a prefix.

    Args:
        path: Folder of the checkpoint.
        prefix: Beginning of the names, which the result leaves out.

    Raises:
        ValueError: if the checkpoint holds more than tensors and plain values.
    """
    entries = ShardReader(path).read_metadata().state_dict_metadata
    return {
        name.removeprefix(prefix): entry.size
        for name, entry in entries.items()
        if name.startswith(prefix) and isinstance(entry, dcp_metadata.TensorStorageMetadata)
    }


def read_all_shards(path: Path) -> dict[str, Any]:
    """Returns every value of a folder of shards, in the memory of this process.

    Args:
        path: Folder of the checkpoint.

    Raises:
        ValueError: if the checkpoint holds more than tensors and plain values.
    """
    state: dict[str, Any] = {}
    reader = ShardReader(path)
    reader.read_metadata()
    with _own_errors():
        _load_state_dict(state, storage_reader=reader, planner=_AllPlainValues(), no_dist=True)
    return state


@contextmanager
def _own_errors() -> Iterator[None]:
    """Context manager that raises a ValueError of lctrain unwrapped, since torch wraps it."""
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        own = next((cause for cause in causes if isinstance(cause, ValueError)), None)
        if own is None:
            raise
        raise own from None


def _more_than_values(place: Path | str, reason: str) -> ValueError:
    return ValueError(
        f"checkpoint must hold tensors and plain values only, got {place} with more ({reason}), "
        "which could run code. Use a checkpoint that lctrain wrote."
    )
