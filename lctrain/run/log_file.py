"""`train.log`: everything that a run logs, its warnings, and the error that ends it."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"

_only_file = logging.getLogger("lctrain.run.only_file")


class _LogFile(logging.FileHandler):
    """A log file that a full disk may cut short: what matters is on the terminal, too."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Says nothing about an error of the disk, which ends the run with a message of its own."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Closes the file, whether or not what is left to write fits on the disk."""
        with suppress(OSError):
            super().close()


@contextmanager
def log_file(path: Path, writes: bool = True) -> Iterator[None]:
    """Context in which log messages are appended to a file.

    Messages of lctrain are kept from level INFO on, others as the root logger lets them through.

    Args:
        path: The file.
        writes: False for ranks that write nothing.
    """
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
        _only_file.warning("%s", warnings.formatwarning(*arguments[:4]).rstrip())

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
    """Writes text to the log file that was printed already, and prints nothing."""
    if _only_file.handlers:
        _only_file.info("%s", text)
