"""Counts a device's multiprocessors, for the grid size of persistent kernels."""

from __future__ import annotations

import functools

import torch

INTERPRETER_PROGRAMS = 3
"""Few enough that each program of a persistent grid walks over several pieces of work in tests."""


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a GPU; a small number under Triton's interpreter."""
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
