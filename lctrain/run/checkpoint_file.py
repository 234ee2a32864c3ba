"""Reads and writes checkpoint files: atomically, with a checksum, without running stored code.

A checkpoint is the zip archive that `torch.save` writes. The comment of the archive holds the
SHA-256 of the archive without the comment, so the checksum is part of the file.
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

from lctrain.run.seal import META, DamagedCheckpointError, seal

WRITING = ".writing"  # suffix of a file that is being written

ALLOWED: list[Any] = []
"""Classes and functions that a checkpoint may contain besides tensors and plain values. lctrain's
checkpoints contain none. A callback whose state holds other objects adds their classes here."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning plugin that writes checkpoints atomically: a file is complete or does not exist.

    It writes a temporary file beside the target, adds the checksum, flushes the file to disk and
    renames it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint atomically.

        Args:
            checkpoint: State to write.
            path: File to write.
            storage_options: Not used.

        Raises:
            OSError: if the file cannot be written. torch raises a RuntimeError in some such cases;
                the OSError is raised instead. No file remains.
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
        """Reads a checkpoint to the CPU. Lightning's strategy then moves states to the device.

        Args:
            path: Checkpoint file.
            map_location: As in `torch.load`; None reads to the CPU.
            weights_only: Whether to accept only tensors, plain values and the classes in ALLOWED;
                None means True.

        Raises:
            ValueError: if the file is damaged, or holds an object that is not accepted.
        """
        location = "cpu" if map_location is None else map_location
        if weights_only is False:
            return dict(torch.load(path, map_location=location, weights_only=False))
        return read_checkpoint(Path(path), map_location=location)


def read_checkpoint(path: Path, **options: Any) -> dict[str, Any]:
    """Reads a checkpoint without running code from the file.

    Args:
        path: Checkpoint file; or the folder of a sharded checkpoint, whose weights and optimizer
            states are not read.
        options: Options of `torch.load`. With mmap=True a tensor is read when it is first used.

    Raises:
        DamagedCheckpointError: if torch cannot read the file.
        ValueError: if the file holds objects other than tensors, plain values and those of classes
            in ALLOWED.
    """
    path = path / META if path.is_dir() else path
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
    """Wrapper of a file that hashes the bytes written and remembers the first OSError.

    Attributes:
        digest: SHA-256 of the bytes written so far.
        error: First error of the file; None without an error.
    """

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
    """Flushes a file to disk, if the file system supports it.

    Args:
        descriptor: File descriptor.
    """
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
