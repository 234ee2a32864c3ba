"""Checks the arguments of dual_chunk_attn_varlen_func that other attentions do not have."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def check_chunks(
    chunk_size: int,
    local_size: int,
    inv_freq: Tensor,
    logit_scale: Tensor | None,
    head_dim: int,
    documents: int,
    device: torch.device,
) -> None:
    """Checks chunk_size, local_size, inv_freq and logit_scale of dual_chunk_attn_varlen_func.

    inv_freq must be [D/2] and logit_scale [N] or None, both float32 on q's device.
    """
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
