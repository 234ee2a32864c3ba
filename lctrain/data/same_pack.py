"""SamePacks: finds ranks of a context group that got different packs."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from lctrain.batch import PackedBatch
from lctrain.distributed.topology import Topology

_NONE = -(2**62)  # stands for the checksum of other ranks' packs; below every checksum
_FACTOR = 1_000_003


class SamePacks:
    """Compares the packs of the ranks of each context group, by a checksum per batch.

    It does not wait for a GPU: there, the result of a batch is read when the next one comes. Only
    the first batch is compared at once. On a CPU all are.
    """

    def __init__(self) -> None:
        self._found: Tensor | None = None
        self._event: Any = None
        self._has_first = False

    def compare(self, batch: PackedBatch, ranks: Topology) -> None:
        """Compares a batch with those of the other ranks. All ranks must call this method.

        Args:
            batch: The whole pack, or this rank's share of it, on the device of the collectives.
            ranks: The ranks of the run.

        Raises:
            ValueError: on all ranks, if ranks of any context group got different packs, now or at
                the last call.
        """
        self._require_same(ranks)
        own = pack_checksum(batch)
        found = own.new_full((2, ranks.data_size), _NONE)
        found[:, ranks.data_rank] = torch.stack([own, -own])
        ranks.maximum(found)  # largest, and minus the smallest, checksum of each context group
        self._found = found.to("cpu", non_blocking=True)
        if found.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()
        if not (self._has_first and found.is_cuda):
            self._has_first = True
            self._require_same(ranks)

    def _require_same(self, ranks: Topology) -> None:
        if self._found is None:
            return
        if self._event is not None:
            self._event.synchronize()
        largest, smallest = self._found[0], -self._found[1]
        self._found = self._event = None
        if not torch.equal(largest, smallest):
            raise ValueError(
                f"the {ranks.context} ranks of a context group must get the same pack, got "
                "different ones. Give the sampler Topology.of(trainer).data_size and data_rank, or "
                "use PackedDataModule."
            )


def pack_checksum(batch: PackedBatch) -> Tensor:
    """Returns a checksum of a pack, 0-dim int64 in [0, 2^62) on its device, without waiting for it.

    The checksum covers lengths and document ids, and tokens and labels too if the batch is a whole
    pack. Shares of one pack have equal checksums.

    Args:
        batch: A whole pack, or a share of it.
    """
    sums = [_weighted_sum(batch.document_ids)]
    if batch.share is None:
        sums += [_weighted_sum(batch.input_ids), _weighted_sum(batch.labels)]
    found = torch.full_like(sums[0], zlib.crc32(repr(tuple(batch.lengths)).encode()))
    for each in sums:
        found = found * _FACTOR + each
    return found & (2**62 - 1)


def _weighted_sum(values: Tensor) -> Tensor:
    """Returns the sum of values times their places, from 1, modulo 2^64: 0-dim int64."""
    flat = values.flatten().long()
    return (flat * torch.arange(1, len(flat) + 1, device=flat.device)).sum()
