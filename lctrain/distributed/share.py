"""PackShare: one rank's share of a pack, which a batch carries to the attention of its model."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.distributed.context import ContextShard
from lctrain.distributed.shared_pack import ContextGroups, SharedPack


class PackShare:
    """The tokens of a pack that one rank of a context group computes.

    Args:
        plan: Division of the pack over the ranks of the group.
        rank: Index in its context group of the rank that computes this share.
        places: [max(tokens, 1)] int64, indices of the share's tokens in the pack. A share without
            tokens has the first token of the pack as a filler, which has no target and takes no
            part in the attention.
        shared: The pack as the attention of this rank needs it; None until `shared_by` sets it.
    """

    # Lightning's convert_input goes into dataclasses, and copies them.
    def __init__(
        self, plan: ContextShard, rank: int, places: Tensor, shared: SharedPack | None = None
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.places = places
        self._shared = shared

    @property
    def size(self) -> int:
        """Number of shares."""
        return self.plan.size

    @property
    def tokens(self) -> int:
        """Number of tokens of this share, without the filler."""
        return self.plan.tokens[self.rank]

    @property
    def pack_tokens(self) -> int:
        """Number of tokens of the whole pack."""
        return len(self.plan.order)

    @property
    def first_position(self) -> int:
        """Position in its document, counted from 0, of the share's first token."""
        if self.tokens == 0:
            return 0  # the filler is the first token of the pack
        place = int(self.plan.order[sum(self.plan.tokens[: self.rank])])
        ends = list(accumulate(self.plan.lengths))
        document = bisect_right(ends, place)
        return place - ends[document] + self.plan.lengths[document]

    @property
    def shared(self) -> SharedPack:
        """The pack as the attention of this rank needs it.

        Raises:
            ValueError: before `shared_by`, or after a move to another device.
        """
        if self._shared is None:
            raise ValueError(
                f"a shared pack must be computed by {self.size} ranks of a process group, got a "
                "share without one. Train with trainer.strategy=fsdp2 and "
                "trainer.context_parallel, or call PackShare.shared_by after the move to the "
                "device."
            )
        return self._shared

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackShare:
        """Returns the share with its tensors on `device`.

        On another device the result needs `shared_by` again.
        """
        places = self.places.to(device, non_blocking=non_blocking)
        shared = self._shared if places.device == self.places.device else None
        return PackShare(self.plan, self.rank, places, shared)

    def pin_memory(self) -> PackShare:
        """Returns the share with `places` in pinned host memory."""
        return PackShare(self.plan, self.rank, self.places.pin_memory(), self._shared)

    def shared_by(self, groups: ContextGroups, document_ids: Tensor) -> PackShare:
        """Returns this share, with the SharedPack that lets ranks compute the pack together.

        Args:
            groups: Process groups of the ranks that share the pack.
            document_ids: Ids of the pack's documents for the dropout RNG, [N] int32.
        """
        shared = SharedPack.of(self.plan, self.rank, self.places.device, groups, document_ids)
        return PackShare(self.plan, self.rank, self.places, shared)

    def check(self, rows: tuple[int, ...], has_boundaries: bool) -> None:
        """Raises ValueError unless a model's inputs are the tokens of this share.

        `shared_by` has been called before.

        Args:
            rows: Shape (B, S) of the inputs.
            has_boundaries: Whether the inputs include the boundaries of the whole pack.
        """
        assert self.shared is not None
        if tuple(rows) != (1, len(self.places)) or not has_boundaries:
            raise ValueError(
                f"the inputs of a shared pack must be the {len(self.places)} tokens of the share "
                f"with the boundaries of the pack, got shape {list(rows)}. Pass the model_kwargs() "
                "of the batch that share_pack returned."
            )

    @torch.no_grad()
    def gather(self, rows: Tensor) -> Tensor:
        """Gathers the rows of all shares into those of the whole pack, without gradients.

        All ranks of the context group must call it; each gets the result. Besides the result, it
        needs memory for the rows of two shares at most.

        Args:
            rows: [max(tokens, 1), ...], one row per token of this share.

        Returns:
            [T, ...], one row per token of the pack.
        """
        group = self.shared.groups.whole
        found = rows.new_empty((len(self.plan.order), *rows.shape[1:]))
        for rank, count in enumerate(self.plan.tokens):
            if count == 0:
                continue
            is_own = rank == self.rank
            part = rows[:count].contiguous() if is_own else rows.new_empty((count, *rows.shape[1:]))
            dist.broadcast(part, group=group, group_src=rank)
            places = torch.from_numpy(self.plan.indices(rank)).to(rows.device)
            found.index_copy_(0, places, part)
        return found
