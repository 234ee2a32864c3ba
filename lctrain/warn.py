"""warn_caller: issues a warning that names the line of the user's code that caused it."""

from __future__ import annotations

import sys
import warnings

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


def _is_within(module: str) -> bool:
    return module.partition(".")[0] in WITHIN
