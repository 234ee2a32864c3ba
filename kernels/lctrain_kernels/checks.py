"""Argument checks of the public attention functions: each message names the remedy.

Everything here reads shapes, dtypes and Python values. Values of tensors are read on CPU tensors
only, so that no check synchronises with a device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from lctrain_kernels.schedule import TileSchedule

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(name: str, tensor: Tensor) -> None:
    """A tensor of a dtype that attention computes in."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.dtype not in _FLOATS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}. Cast it."
        )


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [T, H, D], k and v [Tk, Hk, D], one dtype, one device, H a multiple of Hk, D >= 1."""
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


def check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int, device: torch.device) -> None:
    """[N + 1] int32 on q's device, from 0 to total, not decreasing (values: CPU tensors only)."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(cu_seqlens).__name__}.")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {cu_seqlens.dtype}. Call .to(torch.int32).")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"{name} must have shape [documents + 1], got {tuple(cu_seqlens.shape)}. "
            "Pass the cumulative lengths with a leading 0."
        )
    if cu_seqlens.device != device:
        raise ValueError(
            f"{name} must be on q's device ({device}), got {cu_seqlens.device}. Move it with .to()."
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if isinstance(cu_seqlens, FakeTensor):
        return
    if int(cu_seqlens[0]) != 0:
        raise ValueError(f"{name} must start at 0, got {int(cu_seqlens[0])}. Prepend a 0.")
    if bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"{name} must not decrease. Pass cumulative lengths, not lengths.")
    if int(cu_seqlens[-1]) != total:
        raise ValueError(
            f"{name} must end at the number of packed tokens ({total}), got {int(cu_seqlens[-1])}. "
            "Drop the tokens beyond the last document, or give them a document of their own."
        )


def check_documents(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int, device: torch.device
) -> None:
    """Both boundaries are valid and describe as many documents."""
    check_cu_seqlens("cu_seqlens", cu_seqlens_q, total_q, device)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, total_k, device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "cu_seqlens and cu_seqlens_k must describe the same documents, got "
            f"{cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}."
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
    """0 <= local_size < chunk_size; inv_freq [D/2] and logit_scale [N], float32 on q's device."""
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


def check_max_seqlen(name: str, value: object) -> None:
    """A Python int; a device tensor would force a synchronisation."""
    if isinstance(value, Tensor) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(
            f"{name} must be a Python int, got {type(value).__name__}. "
            "Compute it from the CPU lengths; reading a device tensor would stall the GPU."
        )


def check_schedule(
    schedule: TileSchedule, documents: int, total_q: int, total_k: int, device: torch.device
) -> None:
    """Built for as many documents and tokens, on q's device."""
    if schedule.q_tiles.device != device:
        raise ValueError(
            f"schedule must be on q's device ({device}), got {schedule.q_tiles.device}. "
            "Call schedule.to(device)."
        )
    if schedule.documents != documents:
        raise ValueError(
            f"cu_seqlens must describe the {schedule.documents} documents that schedule was built "
            f"for, got {documents}. Build the schedule from the lengths of this pack."
        )
    for name, expected, total in (
        ("q", schedule.total_q, total_q),
        ("k", schedule.total_k, total_k),
    ):
        if expected != total:
            raise ValueError(
                f"{name} must hold the {expected} tokens that schedule was built for, got {total}. "
                "Build the schedule from the lengths of this pack, and drop tokens beyond the "
                "last document."
            )


def check_dropout(dropout_p: float, dropout_seed: object) -> None:
    """0 <= p < 1; the seed an int or one int64 element."""
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}.")
    if isinstance(dropout_seed, Tensor):
        if dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1:
            raise TypeError(
                "dropout_seed must be an int or a tensor of one int64 element, got "
                f"{dropout_seed.dtype} of shape {tuple(dropout_seed.shape)}."
            )
    elif dropout_seed is not None and (
        not isinstance(dropout_seed, int) or not -(2**63) <= dropout_seed < 2**63
    ):
        raise TypeError(
            "dropout_seed must be an int64 value or a tensor of one int64 element, got "
            f"{dropout_seed!r}."
        )


def check_window(window_size: Sequence[int] | Tensor, device: torch.device) -> None:
    """Two ints, or an int32 tensor of two on q's device; -1 is unbounded."""
    if isinstance(window_size, Tensor):
        if window_size.shape != (2,) or window_size.dtype != torch.int32:
            raise TypeError(
                "window_size must be two ints or an int32 tensor of shape [2], got "
                f"{window_size.dtype} of shape {tuple(window_size.shape)}."
            )
        if window_size.device != device:
            raise ValueError(
                f"window_size must be on q's device ({device}), got {window_size.device}. Move "
                "it with .to()."
            )
    elif (
        not isinstance(window_size, Sequence)
        or len(window_size) != 2
        or not all(isinstance(side, (int, torch.SymInt)) for side in window_size)
    ):
        raise TypeError(
            f"window_size must be (left, right) ints, -1 for unbounded, got {window_size!r}."
        )


def check_optional_tensors(
    documents: int,
    heads: int,
    device: torch.device,
    alibi_slopes: Tensor | None,
    learnable_sink: Tensor | None,
    document_ids: Tensor | None,
) -> None:
    """Shapes, dtypes and device of the optional tensors."""
    optional = {
        "alibi_slopes": alibi_slopes,
        "learnable_sink": learnable_sink,
        "document_ids": document_ids,
    }
    for name, tensor in optional.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if alibi_slopes is not None:
        if tuple(alibi_slopes.shape) not in ((heads,), (documents, heads)):
            raise ValueError(
                f"alibi_slopes must have shape [{heads}] or [{documents}, {heads}], got "
                f"{tuple(alibi_slopes.shape)}."
            )
        if alibi_slopes.dtype != torch.float32:
            raise TypeError(
                f"alibi_slopes must be float32, got {alibi_slopes.dtype}. Call .float()."
            )
    if learnable_sink is not None and tuple(learnable_sink.shape) != (heads,):
        raise ValueError(
            f"learnable_sink must have shape [{heads}], got {tuple(learnable_sink.shape)}."
        )
    if document_ids is not None:
        if tuple(document_ids.shape) != (documents,):
            raise ValueError(
                f"document_ids must have shape [{documents}], got {tuple(document_ids.shape)}."
            )
        if document_ids.dtype != torch.int32:
            raise TypeError(f"document_ids must be int32, got {document_ids.dtype}. Cast it.")
    for name, tensor in optional.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{name} must be on q's device ({device}), got {tensor.device}. Move it with .to()."
            )


def check_softcap_and_scale(softcap: float, softmax_scale: float | None) -> None:
    """softcap >= 0 and finite; scale > 0 and finite."""
    if softcap < 0 or not softcap < math.inf:
        raise ValueError(f"softcap must be finite and >= 0 (0 turns it off), got {softcap}.")
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise ValueError(
            f"softmax_scale must be finite and > 0, got {softmax_scale}. "
            "Fold the sign of a negative scale into q."
        )
