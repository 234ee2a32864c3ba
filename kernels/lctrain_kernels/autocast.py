"""Reads the dtype of torch's autocast, and sets one for device meta, which torch lacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_ON_META: ContextVar[torch.dtype | None] = ContextVar("autocast_on_meta", default=None)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Returns autocast's dtype for a type of device; None if autocast is off.

    Args:
        device_type: Type of a torch.device, such as "cuda".
    """
    if device_type == "meta":
        return _ON_META.get()
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


@contextmanager
def autocast_on_meta(dtype: torch.dtype | None) -> Iterator[None]:
    """Context manager in which `autocast_dtype("meta")` returns a dtype, as if autocast were on.

    Args:
        dtype: The dtype; None for no autocast.
    """
    token = _ON_META.set(dtype)
    try:
        yield
    finally:
        _ON_META.reset(token)
