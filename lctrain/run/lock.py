"""A lock on a folder that ends with its process, however that process ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

log = logging.getLogger(__name__)

LOCK = "run.lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: set[Path] = set()  # of this process, which the operating system would let in again


class FolderInUseError(ValueError):
    """Another run holds the folder."""


class FolderLock:
    """Holds `<folder>/run.lock`.

    It is a POSIX record lock: a worker process that was forked does not inherit it, so that the
    lock is free as soon as the run's own process is gone. The operating system drops it when the
    process closes any descriptor of the file: nothing else may open it.
    """

    def __init__(self, folder: Path) -> None:
        """Acquires the lock.

        Args:
            folder: An existing folder.

        Raises:
            FolderInUseError: if another run, or this process, has the lock.
        """
        self.path = folder.resolve() / LOCK
        if self.path in _held:
            raise _in_use(folder, "this process")
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._descriptor, 200).decode(errors="replace").strip()
            os.close(self._descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _in_use(folder, holder or "another process") from None
            if error.errno not in UNSUPPORTED:
                raise
            log.warning("%s has no locks: make sure that no other run writes there.", folder)
            self._descriptor = -1
            return
        _held.add(self.path)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(
            self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0
        )

    def release(self) -> None:
        """Releases the lock. The file stays, since removing it would race with the next run."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            _held.discard(self.path)


def is_locked(folder: Path) -> bool:
    """Whether a run holds the folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        FolderLock(folder).release()
    except FolderInUseError:
        return True
    return False


def _in_use(folder: Path, holder: str) -> FolderInUseError:
    return FolderInUseError(
        f"paths.output_dir must be a folder that no other run uses, got {folder}, which {holder} "
        "uses. Wait for it, or choose another folder."
    )
