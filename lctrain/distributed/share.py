"""PackShare: one rank's share of a pack, which a batch carries to the attention of its model."""

from __future__ import annotations

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
    def shared(self) -> SharedPack:
        """The pack as the attention of this rank needs it.

        Raises:
            ValueError: before `shared_by`.
        """
        if self._shared is None:
            raise ValueError(
                f"a shared pack must be computed by {self.size} ranks of a process group, got a "
                "share without one. Train with trainer.strategy=fsdp2 and "
                "trainer.context_parallel, or call PackShare.shared_by."
            )
        return self._shared

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackShare:
        """Returns the share with its tensors on `device`. Call it before `shared_by`."""
        return PackShare(self.plan, self.rank, self.places.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackShare:
        """Returns the share with its tensors in pinned host memory. Call it before `shared_by`."""
        return PackShare(self.plan, self.rank, self.places.pin_memory())

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

        All ranks of the context group must call it; each gets the result.

        Args:
            rows: [max(tokens, 1), ...], one row per token of this share.

        Returns:
            [T, ...], one row per token of the pack.
        """
        counts = self.plan.tokens
        filled = rows.new_zeros((max(counts), *rows.shape[1:]))
        filled[: self.tokens] = rows[: self.tokens]
        parts = [torch.empty_like(filled) for _ in counts]
        dist.all_gather(parts, filled, group=self.shared.groups.whole)
        found = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        order = torch.from_numpy(self.plan.order).to(rows.device)
        return torch.empty_like(found).index_copy_(0, order, found)
