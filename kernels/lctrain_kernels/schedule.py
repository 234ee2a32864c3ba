"""The tile schedule: which tile of 128 queries or keys each program of a kernel works on.

The schedule lists the tiles of all documents of a pack, the most expensive first. It is built once
per batch from the document lengths, and every layer reuses it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lctrain_kernels.lengths import read_lengths

SCHEDULE_ROWS = 128
Work = Callable[[Tensor, Tensor], Tensor]  # (document, block) -> visible keys of a tile


class TileSchedule(NamedTuple):
    """The tiles of a pack's documents, in the order in which a kernel's programs take them.

    A tile is SCHEDULE_ROWS (128) consecutive queries or keys of one document.

    Attributes:
        q_tiles: [n, 2] int32, (document, index of the tile of queries in it). Document -1 is
            an empty slot. Tiles with the most visible keys under a causal mask come first.
        k_tiles: [m, 2] int32, (document, index of the tile of keys in it). The tiles of a
            document are adjacent; the longest document comes first.
        total_q: Number of packed queries in the documents; -1 if only the device knows it.
        total_k: Number of packed keys in the documents; -1 if only the device knows it.
        documents: Number of documents N.
    """

    q_tiles: Tensor
    k_tiles: Tensor
    total_q: int
    total_k: int
    documents: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TileSchedule":
        """Returns the schedule with its tensors on `device`."""
        return self._replace(
            q_tiles=self.q_tiles.to(device, non_blocking=non_blocking),
            k_tiles=self.k_tiles.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "TileSchedule":
        """Returns the schedule with its tensors in pinned host memory."""
        return self._replace(q_tiles=self.q_tiles.pin_memory(), k_tiles=self.k_tiles.pin_memory())


def make_schedule(lengths_q: Sequence[int], lengths_k: Sequence[int] | None = None) -> TileSchedule:
    """Builds the schedule of a pack on the CPU.

    Args:
        lengths_q: Number of queries of each of the N documents, at least 0.
        lengths_k: Number of keys of each document; lengths_q by default.

    Returns:
        The schedule, with CPU tensors; move it with `.to(device)`.

    Raises:
        TypeError: if the lengths are no integers.
        ValueError: if the two sequences differ in length or hold a negative value.
    """
    queries = read_lengths("lengths_q", lengths_q)
    keys = queries if lengths_k is None else read_lengths("lengths_k", lengths_k)
    if queries.shape != keys.shape:
        raise ValueError(
            f"lengths_k must have one entry per document ({len(queries)}), got {len(keys)}. "
            "Pass the lengths of the same documents in the same order."
        )
    if bool((queries < 0).any()) or bool((keys < 0).any()):
        raise ValueError(
            "lengths must be >= 0, got a negative one. Pass differences of cu_seqlens."
        )
    return TileSchedule(
        _tiles(queries, _query_work(queries, keys), int(_blocks(queries).sum())),
        _tiles(keys, _key_order(queries), int(_blocks(keys).sum())),
        int(queries.sum()),
        int(keys.sum()),
        len(queries),
    )


def device_schedule(cu_q: Tensor, cu_k: Tensor, total_q: int, total_k: int) -> TileSchedule:
    """Builds the schedule on the device of cu_q, without a synchronisation, once per (cu_q, cu_k).

    The CPU does not know the number of tiles, so q_tiles and k_tiles have as many slots as there
    may be tiles; unused slots hold document -1. If cu_q does not end at total_q, or cu_k at
    total_k, a device-side assertion stops the program.

    Args:
        cu_q: Cumulative query lengths, [N + 1] int32.
        cu_k: Cumulative key lengths, [N + 1] int32.
        total_q: Number of rows of q.
        total_k: Number of rows of k.
    """
    if cu_q.is_inference() or cu_k.is_inference():
        return _build_on_device(cu_q, cu_k, total_q, total_k)  # no version shows their changes
    per_k = _device_schedules.setdefault(cu_q, WeakTensorKeyDictionary())
    key = (cu_q._version, cu_k._version, total_q, total_k)
    known = per_k.get(cu_k)
    if known is None or known[0] != key:
        known = (key, _build_on_device(cu_q, cu_k, total_q, total_k))
        per_k[cu_k] = known
    return known[1]


_device_schedules: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _build_on_device(cu_q: Tensor, cu_k: Tensor, total_q: int, total_k: int) -> TileSchedule:
    for name, cu, total in (("cu_seqlens_q", cu_q, total_q), ("cu_seqlens_k", cu_k, total_k)):
        valid = (cu[0] == 0) & (cu[-1] == total) & (cu.diff() >= 0).all()
        torch._assert_async(
            valid, f"{name} must start at 0, not decrease and end at the {total} packed tokens."
        )
    documents = cu_q.numel() - 1
    queries, keys = cu_q.diff().long(), cu_k.diff().long()
    return TileSchedule(
        _tiles(queries, _query_work(queries, keys), total_q // SCHEDULE_ROWS + documents),
        _tiles(keys, _key_order(queries), total_k // SCHEDULE_ROWS + documents),
        -1,
        -1,
        documents,
    )


def _blocks(lengths: Tensor) -> Tensor:
    return (lengths + SCHEDULE_ROWS - 1) // SCHEDULE_ROWS


def _query_work(queries: Tensor, keys: Tensor) -> Work:
    """Returns the work of each tile of queries, by which q_tiles are ordered.

    The work of a tile is the number of keys that its last query sees under a causal mask.
    """
    return lambda document, block: torch.minimum(
        (block + 1) * SCHEDULE_ROWS + (keys - queries)[document], keys[document]
    )


def _key_order(queries: Tensor) -> Work:
    """Returns the number by which tiles of keys are ordered: their document's length in queries.

    So the tiles of a document stay together. They read the same queries, and in the Hopper kernels
    add to the same rows of dq; programs that run side by side find both in L2. Under a causal mask
    the first tile of a document has the most work.
    """
    return lambda document, block: queries[document]


def _tiles(lengths: Tensor, work: Work, slots: int) -> Tensor:
    """Returns the tiles of a pack, [slots, 2] int32 (document, index of the tile), most work first.

    Tiles of equal work keep their order. Empty slots come last, with document -1.

    Args:
        lengths: Number of queries or keys of each document, [N].
        work: Function from (document, index of the tile) to the number by which tiles are ordered.
        slots: Number of rows of the result, at least the number of tiles.
    """
    if len(lengths) == 0:
        return lengths.new_empty((0, 2), dtype=torch.int32)
    counts = _blocks(lengths)
    ends = counts.cumsum(0)
    slot = torch.arange(slots, device=lengths.device)
    document = torch.searchsorted(ends, slot, right=True)
    used = document < len(lengths)
    document = document.clamp(max=len(lengths) - 1)
    block = slot - (ends - counts)[document]
    amount = torch.where(used, work(document, block), torch.iinfo(torch.int64).min)
    tiles = torch.stack([torch.where(used, document, -1), block], dim=1).to(torch.int32)
    return tiles[torch.argsort(amount, descending=True, stable=True)].contiguous()
