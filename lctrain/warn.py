"""warn_caller: a warning that names the line of the user's code which led to it."""

from __future__ import annotations

import sys
import warnings

WITHIN = ("lctrain", "lctrain_kernels", "torch")


def warn_caller(message: str) -> None:
    """Warns with the innermost line outside of this package and of torch, which calls modules.

    Args:
        message: What is wrong, and the remedy.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_within(str(frame.f_globals.get("__name__"))):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_within(module: str) -> bool:
    return module.partition(".")[0] in WITHIN
