"""Checks the arguments that describe packed documents. Each error message names the remedy.

Values of tensors are read where `has_values` says so, so that no check synchronises with a GPU.
"""

import torch
from torch import Tensor

from lctrain_kernels.checks import has_values
from lctrain_kernels.schedule import TileSchedule

DRAW_ROWS = 16  # queries that share draws of dropout's random bits; see reference/philox.py


def check_cu_seqlens(
    name: str, cu_seqlens: Tensor, total: int | None, device: torch.device
) -> None:
    """Raises unless cu_seqlens is [N + 1] int32 on q's device.

    Where values are read, they must also never decrease and run from 0 to `total`, if that is
    given.
    """
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
    if not has_values(cu_seqlens):
        return
    if int(cu_seqlens[0]) != 0:
        raise ValueError(f"{name} must start at 0, got {int(cu_seqlens[0])}. Prepend a 0.")
    if bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"{name} must not decrease. Pass cumulative lengths, not lengths.")
    if total is not None and int(cu_seqlens[-1]) != total:
        raise ValueError(
            f"{name} must end at the number of packed tokens ({total}), got {int(cu_seqlens[-1])}. "
            "Drop the tokens beyond the last document, or give them a document of their own."
        )


def check_max_seqlen(name: str, value: object, cu_seqlens: Tensor | None = None) -> None:
    """Raises unless a longest length is a Python int, and no document is longer.

    Args:
        name: Name of the argument, for the message.
        value: The longest length. Reading a tensor would synchronise.
        cu_seqlens: Cumulative lengths of the documents, read where `has_values` says so; or None.
    """
    is_int = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    if isinstance(value, Tensor) or not is_int:
        raise TypeError(
            f"{name} must be a Python int, got {type(value).__name__}. "
            "Compute it from the CPU lengths; reading a device tensor would stall the GPU."
        )
    if cu_seqlens is None or not has_values(cu_seqlens) or len(cu_seqlens) < 2:
        return
    longest = int(cu_seqlens.diff().max())
    if longest > value:  # type: ignore[operator]
        raise ValueError(
            f"{name} must be at least {longest}, the tokens of the longest document, got {value}. "
            "The kernels start no program for more."
        )


def check_document_ids(document_ids: Tensor | None, documents: int, device: torch.device) -> None:
    """Raises unless document_ids is [N] int32 on q's device, or None."""
    _check_per_document("document_ids", document_ids, documents, device)


def check_query_offsets(
    query_offsets: Tensor | None, cu_seqlens_q: Tensor, device: torch.device
) -> None:
    """Raises unless query_offsets is [N] int32 on q's device, or None.

    Where values are read, the offsets of documents with queries must also be multiples of
    DRAW_ROWS, from 0 on.
    """
    _check_per_document("query_offsets", query_offsets, cu_seqlens_q.shape[0] - 1, device)
    if query_offsets is None or not has_values(query_offsets):
        return
    wrong = (query_offsets < 0) | (query_offsets % DRAW_ROWS != 0)
    wrong = query_offsets[wrong & (cu_seqlens_q.diff() > 0)]
    if len(wrong):
        raise ValueError(
            f"query_offsets must be multiples of {DRAW_ROWS}, from 0 on, got {int(wrong[0])}. "
            f"{DRAW_ROWS} queries share draws of dropout's random bits: split documents between "
            "ranks at multiples of 128, which also keeps every bit of the unsharded result."
        )


def _check_per_document(
    name: str, tensor: Tensor | None, documents: int, device: torch.device
) -> None:
    """Raises unless a tensor is [N] int32 on q's device, or None."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tuple(tensor.shape) != (documents,):
        raise ValueError(f"{name} must have shape [{documents}], got {tuple(tensor.shape)}.")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {tensor.dtype}. Cast it.")
    if tensor.device != device:
        raise ValueError(
            f"{name} must be on q's device ({device}), got {tensor.device}. Move it with .to()."
        )


def check_schedule(
    schedule: TileSchedule, documents: int, total_q: int, total_k: int, device: torch.device
) -> None:
    """Raises unless a tile schedule fits the documents and tokens, and is on q's device."""
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
