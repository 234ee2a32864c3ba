"""Checkpoint files: written whole or not at all, sealed with a checksum, read without running code.

A checkpoint is the zip archive that `torch.save` writes. The archive's comment holds the SHA-256 of
the archive without a comment, so that the checksum stays with the file wherever it goes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lctrain.run.seal import DamagedCheckpointError, seal

WRITING = ".writing"  # suffix of a file that is being written

ALLOWED: list[Any] = []
"""Classes and functions that a checkpoint may name besides tensors and plain values. lctrain's need
none; a callback that keeps an object of its own adds its class here."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, seals it, flushes it to disk, then renames it.

    A target is never half written.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes `checkpoint` to `path` at once.

        Raises:
            OSError: if it cannot be written, also if torch hides that behind an error of its own;
                nothing is left behind.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + WRITING)
        try:
            with temporary.open("w+b") as file:
                hashed = _HashingFile(file)
                try:
                    torch.save(checkpoint, cast("IO[bytes]", hashed))
                except RuntimeError as error:
                    raise hashed.error or error from None
                seal(file, hashed.digest.hexdigest())
                file.flush()
                _sync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint to the CPU; the strategy moves what belongs on a device.

        Args:
            path: The file.
            map_location: See `torch.load`.
            weights_only: Read tensors, plain values and what ALLOWED lists only; None for yes.

        Raises:
            ValueError: if the file is damaged, or holds other objects than tensors and plain
                values.
        """
        location = (lambda storage, _: storage) if map_location is None else map_location
        if weights_only is False:
            return dict(torch.load(path, map_location=location, weights_only=False))
        return read_checkpoint(Path(path), map_location=location)


def read_checkpoint(path: Path, **options: Any) -> dict[str, Any]:
    """Reads a checkpoint; code that it may hold is not run.

    Args:
        path: The file.
        options: Options of `torch.load`; with mmap=True tensors are read when they are used.

    Raises:
        DamagedCheckpointError: if torch cannot read it.
        ValueError: if it holds more than tensors, plain values and what ALLOWED lists.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            loaded: Mapping[str, Any] = torch.load(path, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(path):
            raise _no_checkpoint(path) from None
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error))
        raise ValueError(
            f"checkpoint must hold tensors and plain values only, got {path} with more "
            f"({reason.strip().partition('. Please')[0]}), which could run code. Use a checkpoint "
            "that lctrain wrote; a class that you trust goes into "
            "lctrain.run.checkpoint_file.ALLOWED."
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DamagedCheckpointError(
            f"checkpoint must be readable, got {path}, which is damaged "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
            "Use an earlier one."
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(
            f"checkpoint must be one of a training run, got {path}, which holds a "
            f"{type(loaded).__name__}. Give the path of a file that StepCheckpoint wrote."
        )
    return dict(loaded)


class _HashingFile:
    """Passes bytes on to a file, and keeps their hash and the file's first error."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _sync(descriptor: int) -> None:
    """Flushes to disk, if the file system supports that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def _no_checkpoint(path: Path) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"checkpoint must be a file that torch.save wrote, got {path}, which is damaged or "
        "something else. Use an earlier one."
    )
