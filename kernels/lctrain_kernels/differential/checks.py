"""Checks the arguments of diff_attn_varlen_func that other attentions do not have."""

import torch
from torch import Tensor

from lctrain_kernels.checks import check_floating

MAX_HEAD_DIM = 128


def check_branches(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, v: Tensor) -> None:
    """Checks that q1 and q2 are [T, H, D], k1 and k2 [Tk, Hk, D], and v [Tk, Hk, Dv].

    D is at most 128, and Dv is D or 2 D.
    """
    tensors = {"q1": q1, "q2": q2, "k1": k1, "k2": k2, "v": v}
    for name, tensor in tensors.items():
        check_floating(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} must have shape [tokens, heads, head_dim], got {tuple(tensor.shape)}. "
                "Pack the documents along the first dimension."
            )
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        raise TypeError(
            "q1, q2, k1, k2 and v must have one dtype, got "
            f"{', '.join(str(tensor.dtype) for tensor in tensors.values())}. "
            "Under autocast, cast them to v's dtype."
        )
    if len({tensor.device for tensor in tensors.values()}) > 1:
        raise ValueError(
            "q1, q2, k1, k2 and v must be on one device, got "
            f"{', '.join(str(tensor.device) for tensor in tensors.values())}. Move them."
        )
    for first, second, one, other in (("q1", "q2", q1, q2), ("k1", "k2", k1, k2)):
        if one.shape != other.shape:
            raise ValueError(
                f"{first} and {second} must have one shape, got {tuple(one.shape)} and "
                f"{tuple(other.shape)}. Every head is a pair of branches: split an even number of "
                "heads, as x[:, 0::2] and x[:, 1::2] or as x[:, :H] and x[:, H:]."
            )
    head_dim = q1.shape[2]
    if head_dim != k1.shape[2]:
        raise ValueError(
            f"q1 and k1 must have one head dim, got {head_dim} and {k1.shape[2]}. Check the "
            "layout [T, H, D]."
        )
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim must be between 1 and {MAX_HEAD_DIM}, got {head_dim}. Call "
            "flash_attn_varlen_func once per branch for larger ones."
        )
    if v.shape[2] not in (head_dim, 2 * head_dim):
        raise ValueError(
            f"v must have a head dim of {head_dim} (D) or {2 * head_dim} (2 D), got {v.shape[2]}. "
            "The two value halves of a pair are one head: v.unflatten(1, (-1, 2)).flatten(2), or "
            "cat((v[:, :H], v[:, H:]), 2), whichever way its heads pair."
        )
    if k1.shape[:2] != v.shape[:2]:
        raise ValueError(
            "k1, k2 and v must have the same tokens and heads, got "
            f"{tuple(k1.shape[:2])} and {tuple(v.shape[:2])}. One value head serves both branches "
            "of a pair."
        )
    heads, heads_kv = q1.shape[1], k1.shape[1]
    if heads == 0 or heads_kv == 0 or heads % heads_kv:
        raise ValueError(
            f"heads of q1 must be a multiple of those of k1, got {heads} and {heads_kv}. Count "
            "pairs, not query heads."
        )


def check_lam(lam: Tensor, tokens: int, heads: int, device: torch.device) -> None:
    """Raises unless lam is a floating-point scalar, [H] or [T, H], on q1's device."""
    if not isinstance(lam, Tensor):
        raise TypeError(
            f"lam must be a torch.Tensor, got {type(lam).__name__}. Pass torch.tensor(lam) on "
            "q1's device."
        )
    if not lam.dtype.is_floating_point:
        raise TypeError(f"lam must be floating point, got {lam.dtype}. Call .float().")
    if tuple(lam.shape) not in ((), (heads,), (tokens, heads)):
        raise ValueError(
            f"lam must be a scalar or have shape [{heads}] or [{tokens}, {heads}], got "
            f"{tuple(lam.shape)}. One per head is one per pair of branches."
        )
    if lam.device != device:
        raise ValueError(f"lam must be on q1's device ({device}), got {lam.device}. Move it.")
