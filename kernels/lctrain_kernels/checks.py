"""Argument checks of the public attention functions: each message names the remedy.

Everything here reads shapes, dtypes and Python values. Values of tensors are read on CPU tensors
only, so that no check synchronises with a device.
"""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises unless a tensor has a dtype in which attention computes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.dtype not in _FLOATS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}. Cast it."
        )


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Checks q [T, H, D], k and v [Tk, Hk, D]: one dtype and device, H a multiple of Hk, D >= 1."""
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


def check_dual_chunk(
    chunk_size: int,
    local_size: int,
    inv_freq: Tensor,
    logit_scale: Tensor | None,
    head_dim: int,
    documents: int,
    device: torch.device,
) -> None:
    """Checks chunk sizes, and inv_freq [D/2] and logit_scale [N], float32 on q's device."""
    for name, value in (("chunk_size", chunk_size), ("local_size", local_size)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(
                f"{name} must be a Python int, got {type(value).__name__}. Pass a number of tokens."
            )
    if not 0 <= local_size < chunk_size:
        raise ValueError(
            f"local_size must be at least 0 and below chunk_size ({chunk_size}), got {local_size}. "
            "Chunks hold chunk_size - local_size tokens; an eighth of the trained window is usual."
        )
    if head_dim % 2:
        raise ValueError(
            f"head_dim must be even, got {head_dim}: RoPE rotates pairs of columns. Use "
            "flash_attn_varlen_func for models without RoPE."
        )
    tensors = {"inv_freq": (inv_freq, head_dim // 2), "logit_scale": (logit_scale, documents)}
    for name, (tensor, size) in tensors.items():
        if tensor is None and name == "logit_scale":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a float32 tensor, got {got}. Call .float().")
        if tuple(tensor.shape) != (size,):
            raise ValueError(
                f"{name} must have shape [{size}] "
                f"({'head_dim / 2' if name == 'inv_freq' else 'one per document'}), got "
                f"{tuple(tensor.shape)}. "
                + (
                    "Partial rotary embeddings are not supported."
                    if name == "inv_freq"
                    else "Give every document of the pack a factor."
                )
            )
        if tensor.device != device:
            raise ValueError(
                f"{name} must be on q's device ({device}), got {tensor.device}. Move it with .to()."
            )
        if tensor.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient, which it does not get. Pass {name}.detach()."
            )
    if logit_scale is None or device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not isinstance(logit_scale, FakeTensor) and not bool((logit_scale > 0).all()):
        raise ValueError(
            f"logit_scale must be positive, got {float(logit_scale.min())}. A factor of 1 changes "
            "nothing."
        )
