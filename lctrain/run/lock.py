"""FolderLock: a lock on a folder that the operating system releases when the process ends."""

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

_held: set[Path] = set()  # locks of this process: a second lock by the same process would succeed


class FolderInUseError(ValueError):
    """Raised if another run has locked the folder."""


class FolderLock:
    """Exclusive lock on a folder: a POSIX record lock on the file `<folder>/run.lock`.

    Forked worker processes do not inherit a record lock, so the lock is released as soon as the
    run's own process ends. The operating system also releases the lock if the process closes any
    descriptor of the file; no other code may open it.
    """

    def __init__(self, folder: Path) -> None:
        """Acquires the lock.

        Args:
            folder: An existing folder.

        Raises:
            FolderInUseError: if another run has the lock, or this process has it already.
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
        """Releases the lock. The file is not deleted, since that would race with the next run."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            _held.discard(self.path)


def is_locked(folder: Path) -> bool:
    """Whether a run has locked the folder."""
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
