"""dataset_errors: turns the errors of `datasets` about a user's dataset into messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MOST = 300  # characters of a reason
_NETWORK = ("huggingface_hub", "httpx", "httpcore", "fsspec", "aiohttp")


@contextmanager
def dataset_errors(name: str) -> Iterator[None]:
    """Context manager for loading or reading a dataset of the hub or of a folder.

    Errors about a file of this machine, such as a full disk, are raised as they are, and so are
    errors that no dataset causes.

    Args:
        name: Name of the dataset, for the message.

    Raises:
        ValueError: if there is no such dataset, configuration, split or revision; if the hub cannot
            be reached; if the files of the dataset have different columns or cannot be read.
    """
    from datasets.exceptions import DatasetsError

    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, DatasetsError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.strerror and cause.errno is not None:
            raise cause from None
        package = type(cause).__module__.partition(".")[0]
        known = isinstance(cause, (OSError, ValueError, DatasetsError)) or package in _NETWORK
        if not known:
            raise
        if columns := _unequal_columns(cause):
            raise ValueError(
                f"dataset must have the same columns in all its files, got {name!r}, where only "
                f"some files have {columns}. Name the files in data.files, where columns may "
                "differ, or set data.config to a part of the dataset."
            ) from error
        reason = " ".join(str(cause).split()).rstrip(".") or type(cause).__name__
        raise ValueError(
            f"dataset must be a name on the hub, or a folder with a dataset, got {name!r}, which "
            f"cannot be read: {reason[:_MOST]}. Check data.dataset, its split, config and "
            "revision, and the network."
        ) from error


def _unequal_columns(error: Any) -> str:
    """Returns the columns that only some files of a dataset have; "" for another error."""
    from datasets.table import CastError

    if not isinstance(error, CastError):
        return ""
    return ", ".join(sorted({*error.table_column_names} ^ {*error.requested_column_names}))
