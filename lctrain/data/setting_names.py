"""check_names: refuses settings of the data module that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lctrain.config import DataSettings


def check_names(settings: Mapping[str, Any]) -> None:
    """Raises TypeError for a setting that does not exist.

    Args:
        settings: Settings of the data module, by name.
    """
    known = [field.name for field in fields(DataSettings)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"Did you mean {near[0]}?" if near else "Leave it out."
            raise TypeError(f"settings must be among {', '.join(known)}, got {name}. {remedy}")
