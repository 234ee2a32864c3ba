"""Pack: document boundaries, tile schedule and document ids of a call, validated once."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from lctrain_kernels.layout import unit_stride
from lctrain_kernels.schedule import TileSchedule, complete_schedule


class Pack(NamedTuple):
    """The documents of packed queries and keys: boundaries, tile schedule and ids.

    N is the number of documents. `operators.build_operators` gives every operator one argument per
    field of this class.

    Attributes:
        cu_seqlens_q: Cumulative query lengths, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        q_tiles: Tiles of queries, [n, 2] int32, as in TileSchedule; None builds them on the device.
        k_tiles: Tiles of keys, [m, 2] int32, as in TileSchedule; None builds them on the device.
        document_ids: Ids of the documents in the dropout key, [N] int32; None takes a document's
            index in the pack.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    q_tiles: Tensor | None = None
    k_tiles: Tensor | None = None
    document_ids: Tensor | None = None

    @property
    def documents(self) -> int:
        """N, the number of documents."""
        return self.cu_seqlens_q.shape[0] - 1

    def with_tiles(self, total_q: int, total_k: int) -> "TiledPack":
        """Returns the pack with its tile schedule, which is built on the device if it is missing.

        Args:
            total_q: Number of packed queries T.
            total_k: Number of packed keys Tk.
        """
        schedule = complete_schedule(
            self.q_tiles, self.k_tiles, self.cu_seqlens_q, self.cu_seqlens_k, total_q, total_k
        )
        return TiledPack(
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            schedule.q_tiles,
            schedule.k_tiles,
            self.document_ids,
        )


class TiledPack(NamedTuple):
    """A Pack whose tiles are never None, which launchers take; the fields are those of Pack."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    q_tiles: Tensor
    k_tiles: Tensor
    document_ids: Tensor | None = None


def checked_pack(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    total_q: int,
    total_k: int,
    device: torch.device,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    document_ids: Tensor | None = None,
    schedule: TileSchedule | None = None,
    names: tuple[str, str, str, str] = (
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
    ),
) -> Pack:
    """Checks boundaries, lengths, ids and schedule of a call and returns them as a Pack.

    Only values of CPU tensors are read, so no check synchronises with a GPU.

    Args:
        cu_seqlens_q: Cumulative query lengths, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        total_q: Number of packed queries T.
        total_k: Number of packed keys Tk.
        device: Device of q.
        max_seqlen_q: Longest query length, a Python int.
        max_seqlen_k: Longest key length, a Python int.
        document_ids: Ids of the documents, [N] int32, part of the dropout key; or None.
        schedule: Schedule that make_schedule returned, or None.
        names: Argument names for error messages: boundaries of queries and keys, then longest
            lengths of queries and keys.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or values do not fit; the message names the remedy.
    """
    check_cu_seqlens(names[0], cu_seqlens_q, total_q, device)
    check_cu_seqlens(names[1], cu_seqlens_k, total_k, device)
    documents = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must describe the same documents, got {documents} and "
            f"{cu_seqlens_k.shape[0] - 1}."
        )
    check_max_seqlen(names[2], max_seqlen_q)
    check_max_seqlen(names[3], max_seqlen_k)
    check_document_ids(document_ids, documents, device)
    if schedule is not None:
        check_schedule(schedule, documents, total_q, total_k, device)
    cu_seqlens_q, cu_seqlens_k, document_ids = unit_stride(cu_seqlens_q, cu_seqlens_k, document_ids)
    return Pack(
        cu_seqlens_q,
        cu_seqlens_k,
        None if schedule is None else schedule.q_tiles,
        None if schedule is None else schedule.k_tiles,
        document_ids,
    )


def row_boundaries(batch: int, length: int, device: torch.device) -> Tensor:
    """Returns cu_seqlens [B + 1] int32 of a batch whose rows are documents of equal length.

    The tensor is cached per shape, so its tile schedule is built once.

    Args:
        batch: Batch size B.
        length: Number of tokens in every row.
        device: Device of the result. The result is never an inference-mode tensor.
    """
    if torch.compiler.is_compiling():
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    return _known_row_boundaries(batch, length, device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def _known_row_boundaries(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int, device: torch.device) -> None:
    """Checks that cu_seqlens is [N + 1] int32 on q's device.

    For a CPU tensor, also checks that its values never decrease and run from 0 to `total`.
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


def check_max_seqlen(name: str, value: object) -> None:
    """Raises TypeError unless the value is a Python int; a tensor would need a synchronisation."""
    if isinstance(value, Tensor) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(
            f"{name} must be a Python int, got {type(value).__name__}. "
            "Compute it from the CPU lengths; reading a device tensor would stall the GPU."
        )


def check_document_ids(document_ids: Tensor | None, documents: int, device: torch.device) -> None:
    """Checks that document_ids is [N] int32 on q's device, or None."""
    if document_ids is None:
        return
    if not isinstance(document_ids, Tensor):
        raise TypeError(f"document_ids must be a torch.Tensor, got {type(document_ids).__name__}.")
    if tuple(document_ids.shape) != (documents,):
        raise ValueError(
            f"document_ids must have shape [{documents}], got {tuple(document_ids.shape)}."
        )
    if document_ids.dtype != torch.int32:
        raise TypeError(f"document_ids must be int32, got {document_ids.dtype}. Cast it.")
    if document_ids.device != device:
        raise ValueError(
            f"document_ids must be on q's device ({device}), got {document_ids.device}. Move it "
            "with .to()."
        )


def check_schedule(
    schedule: TileSchedule, documents: int, total_q: int, total_k: int, device: torch.device
) -> None:
    """Checks that a schedule fits the number of documents and tokens, and is on q's device."""
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
