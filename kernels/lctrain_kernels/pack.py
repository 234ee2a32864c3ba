"""Pack: boundaries, lengths, tile schedule, ids and offsets of packed documents.

A Pack is validated and built once per batch, and serves every layer. `PackTensors` holds the
fields that torch.library operators take, `TiledPack` those that kernel launchers take.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lctrain_kernels.layout import unit_stride
from lctrain_kernels.pack_checks import (
    check_cu_seqlens,
    check_document_ids,
    check_max_seqlen,
    check_query_offsets,
    check_schedule,
)
from lctrain_kernels.schedule import TileSchedule, device_schedule


class PackTensors(NamedTuple):
    """The tensors of a Pack and its longest length: arguments of the attention operators.

    N is the number of documents. `operators.build_operators` gives every operator one argument per
    field of this class.

    Attributes:
        cu_seqlens_q: Cumulative query lengths, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        q_tiles: Tiles of queries, [n, 2] int32, as in TileSchedule; None builds them on the device.
        k_tiles: Tiles of keys, [m, 2] int32, as in TileSchedule; None builds them on the device.
        document_ids: Ids of the documents for the dropout RNG, [N] int32; None takes a document's
            index in the pack.
        query_offsets: Position within its document of the first query that this rank holds, [N]
            int32, for the dropout mask; None takes 0: the rank holds whole documents.
        max_seqlen_q: Largest number of queries in a document, which chooses between kernels that
            give the same result; 0 if it is not known.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    q_tiles: Tensor | None = None
    k_tiles: Tensor | None = None
    document_ids: Tensor | None = None
    query_offsets: Tensor | None = None
    max_seqlen_q: int = 0

    @property
    def documents(self) -> int:
        """N, the number of documents."""
        return self.cu_seqlens_q.shape[0] - 1

    def with_tiles(self, total_q: int, total_k: int) -> "TiledPack":
        """Returns the tensors with a tile schedule, which is built on the device if it is missing.

        Args:
            total_q: Number of packed queries T.
            total_k: Number of packed keys Tk.
        """
        q_tiles, k_tiles = self.q_tiles, self.k_tiles
        if q_tiles is None or k_tiles is None:
            q_tiles, k_tiles, *_ = device_schedule(
                self.cu_seqlens_q, self.cu_seqlens_k, total_q, total_k
            )
        return TiledPack(
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            q_tiles,
            k_tiles,
            self.document_ids,
            self.query_offsets,
            self.max_seqlen_q,
        )


class TiledPack(NamedTuple):
    """The tensors of a Pack that kernel launchers take: PackTensors whose tiles are never None.

    The fields are those of PackTensors.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    q_tiles: Tensor
    k_tiles: Tensor
    document_ids: Tensor | None = None
    query_offsets: Tensor | None = None
    max_seqlen_q: int = 0


class Pack(NamedTuple):
    """The documents of packed queries and keys: boundaries, lengths, and what is derived from them.

    `checked_pack` validates a caller's arguments and builds a Pack; `rows_pack` builds the Pack of
    rows of equal length. N is the number of documents.

    Attributes:
        cu_seqlens_q: Cumulative query lengths, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        total_q: Number of packed queries T.
        total_k: Number of packed keys Tk.
        max_seqlen_q: Largest number of queries in a document.
        max_seqlen_k: Largest number of keys in a document.
        document_ids: Ids of the documents for the dropout RNG, [N] int32; None takes a document's
            index in the pack.
        query_offsets: Position within its document of the first query that this rank holds, [N]
            int32, multiples of 16. A rank that holds the queries from position a on passes a: its
            dropout mask then equals that part of the whole document's. None takes 0: the rank holds
            whole documents.
        schedule: Tile schedule of the documents; None builds it on the device, once per pair of
            boundary tensors.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    total_q: int
    total_k: int
    max_seqlen_q: int
    max_seqlen_k: int
    document_ids: Tensor | None = None
    query_offsets: Tensor | None = None
    schedule: TileSchedule | None = None

    @property
    def documents(self) -> int:
        """N, the number of documents."""
        return self.cu_seqlens_q.shape[0] - 1

    def tensors(self) -> PackTensors:
        """Returns what the operators take of the pack."""
        return PackTensors(
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            None if self.schedule is None else self.schedule.q_tiles,
            None if self.schedule is None else self.schedule.k_tiles,
            self.document_ids,
            self.query_offsets,
            self.max_seqlen_q,
        )

    def check_tokens(self, q: Tensor, k: Tensor) -> None:
        """Checks that the pack describes the tokens of q [T, H, D] and k [Tk, Hk, D].

        Raises:
            ValueError: if the number of tokens or the device differs.
        """
        if torch.compiler.is_compiling():
            return
        for name, expected, found in (("q", self.total_q, q), ("k", self.total_k, k)):
            if found.shape[0] != expected:
                raise ValueError(
                    f"{name} must hold the {expected} tokens of its pack, got {found.shape[0]}. "
                    "Build the pack from the lengths of these documents."
                )
        if self.cu_seqlens_q.device != q.device:
            raise ValueError(
                f"q must be on the device of its pack ({self.cu_seqlens_q.device}), got "
                f"{q.device}. Move one of them with .to()."
            )


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
    query_offsets: Tensor | None = None,
    schedule: TileSchedule | None = None,
    names: tuple[str, str, str, str] = (
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
    ),
) -> Pack:
    """Checks boundaries, lengths, ids and schedule of a batch and returns them as a Pack.

    Values of tensors on a GPU are read only if LCTRAIN_CHECK_CACHE=1 is set, which synchronises.

    Args:
        cu_seqlens_q: Cumulative query lengths, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        total_q: Number of packed queries T.
        total_k: Number of packed keys Tk.
        device: Device of q.
        max_seqlen_q: Longest query length, a Python int.
        max_seqlen_k: Longest key length, a Python int.
        document_ids: Ids of the documents, [N] int32, an input of the dropout RNG; or None.
        query_offsets: Position within its document of the first query that this rank holds, [N]
            int32, multiples of 16; or None. See Pack.
        schedule: Schedule that make_schedule returned, or None.
        names: Argument names for error messages: boundaries of queries and keys, then longest
            lengths of queries and keys.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or values do not fit; the message names the remedy.
    """
    check_cu_seqlens(names[0], cu_seqlens_q, total_q, device)
    if cu_seqlens_k is not cu_seqlens_q or total_k != total_q:
        check_cu_seqlens(names[1], cu_seqlens_k, total_k, device)
    documents = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must describe the same documents, got {documents} and "
            f"{cu_seqlens_k.shape[0] - 1}."
        )
    check_max_seqlen(names[2], max_seqlen_q, cu_seqlens_q)
    checked = cu_seqlens_k is cu_seqlens_q and max_seqlen_k == max_seqlen_q
    check_max_seqlen(names[3], max_seqlen_k, None if checked else cu_seqlens_k)
    check_document_ids(document_ids, documents, device)
    check_query_offsets(query_offsets, cu_seqlens_q, device)
    if schedule is not None:
        check_schedule(schedule, documents, total_q, total_k, device)
    cu_seqlens_q, cu_seqlens_k, document_ids, query_offsets = unit_stride(
        cu_seqlens_q, cu_seqlens_k, document_ids, query_offsets
    )
    return Pack(
        cu_seqlens_q,
        cu_seqlens_k,
        total_q,
        total_k,
        max_seqlen_q,
        max_seqlen_k,
        document_ids,
        query_offsets,
        schedule,
    )


def checked_shared_pack(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int,
    max_seqlen_k: int | None,
    *,
    document_ids: Tensor | None,
    schedule: TileSchedule | None,
) -> Pack:
    """Checks and builds the Pack of a call whose queries and keys usually share their boundaries.

    Keys have the boundaries `cu_seqlens` and the longest length `max_seqlen` of the queries, unless
    cu_seqlens_k and max_seqlen_k are given. Error messages name these arguments.

    Args:
        q: Packed queries [T, H, D].
        k: Packed keys [Tk, Hk, D].
        cu_seqlens: Cumulative query lengths, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32, or None.
        max_seqlen: Longest query length, a Python int.
        max_seqlen_k: Longest key length, a Python int, or None.
        document_ids: Ids of the documents for the dropout RNG, [N] int32, or None.
        schedule: Schedule that make_schedule returned, or None.
    """
    return checked_pack(
        cu_seqlens,
        cu_seqlens if cu_seqlens_k is None else cu_seqlens_k,
        q.shape[0],
        k.shape[0],
        q.device,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen if max_seqlen_k is None else max_seqlen_k,
        document_ids=document_ids,
        schedule=schedule,
        names=("cu_seqlens", "cu_seqlens_k", "max_seqlen", "max_seqlen_k"),
    )


def rows_pack(
    batch: int,
    length_q: int,
    length_k: int,
    device: torch.device,
    document_ids: Tensor | None = None,
) -> Pack:
    """Returns the pack of a batch whose rows are documents of equal length.

    Args:
        batch: Batch size B.
        length_q: Queries per row.
        length_k: Keys per row.
        device: Device of the boundaries.
        document_ids: Ids of the rows for the dropout RNG, [B] int32; None takes the row's index.

    Raises:
        TypeError: if document_ids is not an int32 tensor.
        ValueError: if its shape or device does not fit.
    """
    check_document_ids(document_ids, batch, device)
    cu_seqlens_q = row_boundaries(batch, length_q, device)
    cu_seqlens_k = cu_seqlens_q if length_q == length_k else row_boundaries(batch, length_k, device)
    (document_ids,) = unit_stride(document_ids)
    return Pack(
        cu_seqlens_q,
        cu_seqlens_k,
        batch * length_q,
        batch * length_k,
        length_q,
        length_k,
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
