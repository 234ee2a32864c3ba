"""Argument checks of the public attention functions. Each error message names the remedy.

The checks read shapes, dtypes and Python values. They read values of tensors where `reads_values`
says so: on a CPU, and on a GPU if LCTRAIN_CHECK_CACHE=1 is set. Otherwise no check synchronises.
"""

import os

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

SWITCH = "LCTRAIN_CHECK_CACHE"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises unless a tensor has a floating dtype that attention supports.

    Args:
        name: Name of the argument, for the message.
        tensor: Tensor to check.

    Raises:
        TypeError: if the argument is not a tensor, or its dtype is not supported.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.dtype not in _FLOATS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}. Cast it."
        )


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless q is [T, H, D], and k and v are [Tk, Hk, D], of one dtype and device.

    H must be a multiple of Hk, and D at least 1.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} must have shape [tokens, heads, head_dim], got {tuple(tensor.shape)}. "
                "Pack the documents along the first dimension, or call flash_attn_func for [B, "
                "S, H, D]."
            )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}. "
            "Under autocast, cast q and k to v's dtype."
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}. Move "
            "them."
        )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}.")
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q and k must have one head dim, got {q.shape[2]} and {k.shape[2]}. Check the "
            "layout [T, H, D]."
        )
    if q.shape[2] < 1:
        raise ValueError("head_dim must be at least 1, got 0. Check the layout [T, H, D].")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of key/value heads, got {q.shape[1]} and {k.shape[1]}."
        )


def require_tensors(**tensors: Tensor) -> None:
    """Raises a TypeError unless all arguments, given by their names, are tensors."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} must be a torch.Tensor, got {type(tensor).__name__}. Pass a tensor."
            )


def reads_values(device: torch.device) -> bool:
    """Returns whether the checks read values of tensors on a device."""
    if torch.compiler.is_compiling():
        return False
    if device.type == "cpu":
        return True
    if os.environ.get(SWITCH, "0") != "1":
        return False
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def has_values(tensor: Tensor) -> bool:
    """Returns whether the checks read the values of a tensor."""
    return not isinstance(tensor, FakeTensor) and reads_values(tensor.device)
