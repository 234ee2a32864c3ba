"""Shortens torch's error about weights that do not fit a model."""

from __future__ import annotations

import textwrap

LONGEST_REASON = 160  # characters of a line of torch in a message


def reasons(error: RuntimeError) -> str:
    """Returns what torch says about weights that do not fit, shortened to about two lines.

    Args:
        error: Error of `load_state_dict`.
    """
    lines = [line.strip().rstrip(".") for line in str(error).splitlines()]
    found = [line for line in lines if line and not line.startswith("Error(s) in loading")]
    shown = [textwrap.shorten(line, LONGEST_REASON, placeholder=" ...") for line in found[:2]]
    more = len(found) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")
