"""Chooses the implementation of a fused element-wise operation: "triton" or "pytorch"."""

from __future__ import annotations

import importlib.util
import os

import torch

BACKENDS = ("auto", "triton", "pytorch")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fused_backend(device: torch.device, dtype: torch.dtype, backend: str = "auto") -> str:
    """Returns "triton" or "pytorch" for tensors of this device and dtype.

    Args:
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        backend: "auto", "triton" or "pytorch". "auto" chooses "triton" on a GPU for dtypes of at
            most 32 bits, and "pytorch" otherwise.

    Raises:
        ValueError: if the name is unknown, or the named implementation cannot serve the tensors.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend == "pytorch":
        return backend
    on_gpu = device.type == "cuda"  # ROCm devices carry this name too
    serves = dtype in _DTYPES and TRITON_INSTALLED
    if backend == "auto":
        return "triton" if on_gpu and serves else "pytorch"
    if not serves:
        raise ValueError(
            f"backend='triton' needs the package triton and tensors of at most 32 bits, got "
            f"{dtype}. Cast the tensors, or pass backend='auto'."
        )
    if not on_gpu and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise ValueError(
            f"backend='triton' needs tensors on a GPU, got {device.type}. Move them, pass "
            "backend='auto', or set TRITON_INTERPRET=1 before the first import."
        )
    return backend
