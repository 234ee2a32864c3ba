"""log_file: appends log messages, warnings and the final error of a run to a file."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lctrain.warn import forget_logged, warn_once

FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"

_only_file = logging.getLogger("lctrain.run.only_file")


class _LogFile(logging.FileHandler):
    """Log file handler that ignores errors of the disk; the terminal also shows the messages."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignores an error of the disk, which the run reports by itself."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Closes the file, and ignores an error if the buffered text does not fit on the disk."""
        with suppress(OSError):
            super().close()


@contextmanager
def log_file(path: Path, writes: bool = True) -> Iterator[None]:
    """Context manager that appends log messages, warnings and errors to a file.

    lctrain's messages are written from level INFO on. Messages of other packages are written if the
    root logger accepts their level. Every file has the warnings of its own run, though an earlier
    run in this process, such as a job of --multirun, has logged the same.

    Args:
        path: Log file.
        writes: Whether this rank writes the file.
    """
    forget_logged()
    if not writes:
        yield
        return
    handler = _LogFile(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter(FORMAT))
    root, ours = logging.getLogger(), logging.getLogger("lctrain")
    level = ours.level
    if not ours.isEnabledFor(logging.INFO):
        ours.setLevel(logging.INFO)
    _only_file.propagate = False
    root.addHandler(handler)
    _only_file.addHandler(handler)
    shown = warnings.showwarning

    def show_and_keep(*arguments: Any, **options: Any) -> None:
        shown(*arguments, **options)
        warn_once(_only_file, "%s", warnings.formatwarning(*arguments[:4]).rstrip())

    warnings.showwarning = show_and_keep
    try:
        yield
    except Exception as error:
        _only_file.error("%s", "".join(traceback.format_exception(error)).rstrip())
        raise
    finally:
        warnings.showwarning = shown
        root.removeHandler(handler)
        _only_file.removeHandler(handler)
        ours.setLevel(level)
        handler.close()


def log_to_file(text: str) -> None:
    """Writes text to the log file only, for text that has been printed already."""
    if _only_file.handlers:
        _only_file.info("%s", text)
