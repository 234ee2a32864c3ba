"""SharedPack: a pack that the ranks of a context group share, as one rank's attention needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.distributed.collectives import Selection
from lctrain.distributed.context import Chunk, ContextShard
from lctrain.distributed.topology import Topology
from lctrain.transfer import upload

if TYPE_CHECKING:
    from lctrain_kernels.pack import Pack


@dataclass(frozen=True)
class ContextGroups:
    """Process groups of one rank for context parallelism; None stands for torch's default group.

    Attributes:
        whole: The context group: all ranks that share this rank's pack.
        heads: The heads group: consecutive ranks that exchange heads with this rank.
        keys: The ranks that gather keys from each other: those at this rank's position in every
            heads group.
    """

    whole: Any = None
    heads: Any = None
    keys: Any = None

    @classmethod
    def of(cls, size: int, heads: int, whole: Any = None) -> ContextGroups:
        """Returns the process groups of this rank, and creates those that do not exist.

        All ranks must call this method. The ranks of a context group are consecutive.

        Args:
            size: Number of ranks of a context group.
            heads: Number of ranks in a heads group, as in ContextShard.
            whole: Process group of this rank's context group; None for the default one.
        """
        if heads in (1, size):
            return cls(whole, whole, whole)
        ranks, found = Topology.of_process(), {}
        for first in range(0, ranks.size, size):
            everyone = list(range(first, first + size))
            parts = [("heads", everyone[i : i + heads]) for i in range(0, size, heads)]
            parts += [("keys", everyone[i::heads]) for i in range(heads)]
            for name, members in parts:
                group = dist.new_group(members)
                if ranks.rank in members:
                    found[name] = group
        return cls(whole, **found)


@dataclass(frozen=True, eq=False)
class SharedPack:
    """A pack that a context group shares, as one rank's attention needs it.

    It is built once per batch and used by every layer. It holds indices, and no activations.

    Attributes:
        shard: Assignment of the pack's tokens to the ranks.
        rank: Index of this rank in the context group.
        groups: Process groups of this rank.
        pack: Pack that this rank passes to the kernels. Its documents are those of the shared pack.
            If keys are gathered, its documents are the chunks of the heads group: queries of the
            chunk, and the document's keys up to the chunk's end.
        documents: Index in the shared pack of the document of every entry of `pack`, [n] int64;
            None if both packs have the same documents.
        selection: Which of the gathered keys are the keys of `pack`; None if no keys are gathered.
    """

    shard: ContextShard
    rank: int
    groups: ContextGroups
    pack: Pack
    documents: Tensor | None = None
    selection: Selection | None = None

    @classmethod
    @torch.inference_mode(False)  # the tile schedule of inference tensors is built for every layer
    def of(
        cls,
        shard: ContextShard,
        rank: int,
        device: torch.device | str,
        groups: ContextGroups | None = None,
        document_ids: Tensor | None = None,
    ) -> SharedPack:
        """Builds the shared pack for one rank, without synchronising with the device.

        Args:
            shard: Assignment of the pack's tokens to the ranks, the same on every rank.
            rank: Index of this rank in the context group.
            device: Device of the queries.
            groups: Process groups; None uses torch's default group as the context group, which
                requires that shard.heads is 1 or shard.size. `ContextGroups.of` makes them.
            document_ids: Ids of the pack's documents, which key the dropout masks, [N] int32 on any
                device. None uses each document's index in the pack.

        Raises:
            ValueError: if `rank` is not a rank of the group, or heads groups are smaller than the
                context group and `groups` has none.
        """
        if not 0 <= rank < shard.size:
            raise ValueError(
                f"rank must be in [0, {shard.size}), got {rank}. Pass the index in the context "
                "group, Topology.context_rank, and not that among all ranks."
            )
        groups = ContextGroups() if groups is None else groups
        if 1 < shard.heads < shard.size and (groups.heads is None or groups.keys is None):
            raise ValueError(
                f"groups must have process groups for heads groups of {shard.heads} of "
                f"{shard.size} ranks, got none. Pass ContextGroups.of({shard.size}, "
                f"{shard.heads}), which all ranks call."
            )
        device = torch.empty(0, device=device).device  # "cuda" gets the index of the GPU
        if shard.groups == 1:
            lengths = list(shard.lengths)
            return cls(shard, rank, groups, _pack(lengths, lengths, device, document_ids))
        # A rank without tokens has one query of zeros, which sees the first gathered key: it joins
        # every collective, and no kernel gets empty tensors. Its output is not used.
        own = shard.chunks[rank // shard.heads]
        chunks = own or (Chunk(0, 0, 1),)
        documents = _on_device([chunk.document for chunk in chunks], device)
        ids = documents.int()
        if document_ids is not None:
            ids = document_ids.to(device, non_blocking=True).index_select(0, documents)
        keys = shard.keys(rank)
        parts = [part for part in (keys.last, keys.repeated) if len(part)]
        if not own:
            keys, parts = keys._replace(places=np.zeros(1)), [np.zeros(1)]
        return cls(
            shard,
            rank,
            groups,
            _pack(
                [chunk.stop - chunk.start for chunk in chunks],
                [chunk.stop for chunk in chunks],
                device,
                ids,
                _on_device([chunk.start for chunk in chunks], device).int(),
            ),
            documents,
            Selection(
                max(shard.group_tokens),
                _on_device(keys.places, device),
                tuple(_on_device(part, device) for part in parts),
            ),
        )

    @property
    def place(self) -> int:
        """Index of this rank in its heads group."""
        return self.rank % self.shard.heads

    def first_head(self, heads: int) -> int:
        """Returns the index of the first head that this rank computes during attention.

        Args:
            heads: Number of query heads before the exchange of heads.
        """
        return heads // self.shard.heads * self.place

    def of_heads(self, values: Tensor | None) -> Tensor | None:
        """Returns the entries of values [..., H] for the heads that this rank computes.

        For None it returns None.
        """
        if values is None or self.shard.heads == 1:
            return values
        return values.chunk(self.shard.heads, -1)[self.place]

    def of_documents(self, values: Tensor | None) -> Tensor | None:
        """Returns, for each document of `pack`, its entry of values [N, ...] of the shared pack.

        For None it returns None.
        """
        if values is None or self.documents is None:
            return values
        return values.index_select(0, self.documents)


def _pack(
    lengths_q: list[int],
    lengths_k: list[int],
    device: torch.device,
    document_ids: Tensor | None,
    query_offsets: Tensor | None = None,
) -> Pack:
    from lctrain_kernels.pack import checked_pack

    if document_ids is not None:
        document_ids = document_ids.to(device, non_blocking=True)
    ends_q = _boundaries(lengths_q, device)
    return checked_pack(
        ends_q,
        ends_q if lengths_k == lengths_q else _boundaries(lengths_k, device),
        sum(lengths_q),
        sum(lengths_k),
        device,
        max_seqlen_q=max(lengths_q, default=0),
        max_seqlen_k=max(lengths_k, default=0),
        document_ids=document_ids,
        query_offsets=query_offsets,
    )


def _boundaries(lengths: list[int], device: torch.device) -> Tensor:
    return _on_device(torch.tensor([0, *lengths]).cumsum(0), device).int()


def _on_device(values: Any, device: torch.device) -> Tensor:
    """Copies int64 values to a device without a synchronisation."""
    return upload(torch.as_tensor(values, dtype=torch.int64), device)
