"""The dtype of torch's autocast on a device, with one for device meta, which has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_ON_META: ContextVar[torch.dtype | None] = ContextVar("autocast_on_meta", default=None)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Returns autocast's dtype if autocast is on for a type of device, else None.

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
    """Lets `autocast_dtype` return a dtype for device meta, inside the context.

    Args:
        dtype: The dtype; None for no autocast.
    """
    token = _ON_META.set(dtype)
    try:
        yield
    finally:
        _ON_META.reset(token)
