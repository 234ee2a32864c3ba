"""RunView: what a data module reads from its trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from lctrain.data.length_stages import LengthStages
from lctrain.data.share import collate_share
from lctrain.distributed import Topology


@dataclass(frozen=True)
class RunView:
    """What a data module reads from its trainer: ranks, packs of a step, lengths and progress.

    Attributes:
        trainer: Lightning's Trainer; None for a data module without one, which is a single rank.
    """

    trainer: Any

    @property
    def data_size(self) -> int:
        """Number of ranks that read different packs."""
        return Topology.of(self.trainer).data_size

    @property
    def data_rank(self) -> int:
        """Index of this rank among those that read different packs."""
        return Topology.of(self.trainer).data_rank

    @property
    def share(self) -> Any:
        """The `collate_fn` that makes this rank's share of a batch; None if ranks share none."""
        ranks = Topology.of(self.trainer)
        return collate_share(ranks.context, ranks.context_rank, ranks.heads)

    @property
    def accumulated(self) -> int:
        """Number of packs per rank in an optimizer step."""
        return int(getattr(self.trainer, "accumulate_grad_batches", 1))

    @property
    def stages(self) -> LengthStages | None:
        """Packed lengths of the callback LengthSchedule; None without it."""
        return LengthStages.of(self.trainer)

    @property
    def progress(self) -> Any:
        """Lightning's counts of training batches inside `Trainer.fit`; None outside of it."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return None
        return self.trainer.fit_loop.epoch_loop.batch_progress
