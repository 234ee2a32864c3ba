"""Issues warnings: at the line of the user's code, or in the log, once per command."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

_logged: set[tuple[str, str]] = set()  # names of loggers, and messages

WITHIN = ("lctrain", "lctrain_kernels", "torch", "lightning", "pytorch_lightning")


def warn_caller(message: str) -> None:
    """Issues a warning at the innermost line on the stack outside of lctrain, torch and Lightning.

    Args:
        message: Text of the warning: the problem and the remedy.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_within(str(frame.f_globals.get("__name__"))):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def warn_once(log: logging.Logger, message: str, *arguments: object) -> None:
    """Logs a warning, unless this command or run has logged the same message.

    A command evaluates many tasks, methods and models, which have the same to say.

    Args:
        log: Logger of the calling module.
        message: Text of the warning: the problem and the remedy, as a format of `logging`.
        *arguments: Arguments of the format.
    """
    text = message % arguments if arguments else message
    if (log.name, text) not in _logged:
        _logged.add((log.name, text))
        log.warning("%s", text)


def forget_logged() -> None:
    """Lets `warn_once` log every message again: for the next command or run in this process."""
    _logged.clear()


def begin_warnings() -> None:
    """Begins a command, which says each distinct warning once, whatever line of code causes it.

    This holds for `warn_once`, and for warnings of Python: Python itself shows them again after any
    library has changed its filters.
    """
    forget_logged()
    if not isinstance(warnings.showwarning, _ShownOnce):
        warnings.showwarning = _ShownOnce(warnings.showwarning)
    warnings.showwarning.shown.clear()


class _ShownOnce:
    """Replaces `warnings.showwarning`: shows a warning unless its text has been shown."""

    def __init__(self, show: Callable[..., None]) -> None:
        self.show = show
        self.shown: set[tuple[type[Warning], str]] = set()

    def __call__(
        self, message: Warning | str, category: type[Warning], *where: Any, **options: Any
    ) -> None:
        """Shows a warning, with the arguments of `warnings.showwarning`."""
        if (category, str(message)) not in self.shown:
            self.shown.add((category, str(message)))
            self.show(message, category, *where, **options)


def _is_within(module: str) -> bool:
    return module.partition(".")[0] in WITHIN
