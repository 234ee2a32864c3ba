"""Turns storage errors, such as a full disk, into messages with a remedy."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (*FULL, errno.EROFS)
REMEDIES = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some of your quota",
    errno.EFBIG: "Raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "Make it writable",
}


class StorageError(OSError):
    """Raised if a disk is full, a quota is used up, or a file system is read-only."""


def storage_error(error: OSError, what: str, folder: Path, then: str) -> StorageError:
    """Returns a StorageError for an OSError, with a message that names the remedy.

    Args:
        error: Error of the operating system.
        what: Name of what could not be written, such as "checkpoint of step 8".
        folder: Folder of the file.
        then: Instruction for the user after the remedy, without a full stop.

    Returns:
        The error to raise. Its `errno` is that of `error`.
    """
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    reason = os.strerror(error.errno) if error.errno else str(error)
    remedy = REMEDIES.get(error.errno or 0, "Mend it")
    message = (
        f"{what} could not be written to {folder}: {reason} ({free / 2**30:.2f} GiB free). "
        f"{remedy}, then {then}."
    )
    return _Message(error.errno, message)


class _Message(StorageError):
    """StorageError that shows its message without the error number of OSError."""

    def __str__(self) -> str:
        return str(self.args[1])


@contextmanager
def storage_errors(folder: Path, then: str) -> Iterator[None]:
    """Context manager that turns errors of storage into StorageError.

    Args:
        folder: Folder of the run.
        then: Instruction for the user after the remedy, without a full stop.

    Raises:
        StorageError: if the block raises an OSError about a full disk, a used-up quota, a file size
            limit or a read-only file system.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        what = "a file of the run"
        if error.filename and Path(error.filename).is_dir():  # the cache, named by `cache_errors`
            what, folder = "a file of the data", Path(error.filename)
        elif error.filename:
            what, folder = Path(error.filename).name, Path(error.filename).parent
        raise storage_error(error, what, folder, then) from error
