"""share_pack: makes one rank's share of a batch, in the collator or later."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch

from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.distributed.context import ContextShard
from lctrain.distributed.share import PackShare


def share_pack(batch: PackedBatch, size: int, rank: int, heads: int = 1) -> PackedBatch:
    """Returns one rank's share of a batch.

    Tokens, labels and position ids are those of the share. Boundaries, lengths, document ids and
    tile schedule still describe the whole pack.

    Args:
        batch: The whole pack, on any device.
        size: Number of ranks that share it.
        rank: Number of the share.
        heads: Number of ranks in a heads group, as in ContextShard.

    Raises:
        ValueError: if documents of the pack share a prefix.
    """
    if batch.groups is not None:
        raise ValueError(
            f"documents must not share a prefix where {size} ranks share a pack, got groups. Use "
            "trainer.context_parallel=1."
        )
    plan = ContextShard.of(batch.lengths, size, heads)
    places = torch.from_numpy(plan.indices(rank))
    is_empty = len(places) == 0
    places = (torch.zeros(1, dtype=torch.int64) if is_empty else places).to(batch.labels.device)
    labels = batch.labels.index_select(1, places)
    labels = torch.full_like(labels, IGNORE_INDEX) if is_empty else labels
    return dataclasses.replace(
        batch,
        input_ids=batch.input_ids.index_select(1, places),
        labels=labels,
        position_ids=batch.position_ids.index_select(1, places),
        num_tokens=plan.tokens[rank],
        num_valid_tokens=int((labels != IGNORE_INDEX).sum()),
        share=PackShare(plan, rank, places),
    )


def whole_pack(batch: PackedBatch) -> PackedBatch:
    """Returns the whole pack of a share. All ranks of the group must call it.

    Args:
        batch: A batch with a share, on the device of the group's ranks.
    """
    share = batch.share
    assert share is not None
    labels, position_ids = (share.gather(x[0])[None] for x in (batch.labels, batch.position_ids))
    return dataclasses.replace(
        batch,
        input_ids=share.gather(batch.input_ids[0])[None],
        labels=labels,
        position_ids=position_ids,
        num_tokens=len(share.plan.order),
        num_valid_tokens=int((labels != IGNORE_INDEX).sum()),
        share=None,
    )


def share_item(item: Any, size: int, rank: int, heads: int) -> Any:
    """Returns a data loader's item, with its batch replaced by one rank's share.

    Args:
        item: A PackedBatch; or, for a stream, a named tuple with the batch in its field `batch`.
        size: Number of ranks that share a pack.
        rank: Number of the share.
        heads: Number of ranks that exchange heads.
    """
    if isinstance(item, PackedBatch):
        return share_pack(item, size, rank, heads)
    return item._replace(batch=share_pack(item.batch, size, rank, heads))


def collate_share(size: int, rank: int, heads: int) -> Any:
    """Returns the `collate_fn` that makes one rank's share of every item; None for one rank.

    Args:
        size: Number of ranks that share a pack.
        rank: Number of the share.
        heads: Number of ranks that exchange heads.
    """
    return None if size == 1 else partial(share_item, size=size, rank=rank, heads=heads)
