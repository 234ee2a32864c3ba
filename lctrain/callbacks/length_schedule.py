"""LengthSchedule: grows the packed length during training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim.lr_scheduler import LambdaLR

from lctrain.callbacks.patching import say
from lctrain.data import PackedDataModule
from lctrain.data.length_stages import LengthStages
from lctrain.distributed import Topology
from lctrain.limits import require
from lctrain.log_steps import at_log_step

LEARNING_RATES = ("steps", "tokens")


class LengthSchedule(pl.Callback):
    """Trains on short packs first, and on longer ones from given optimizer steps on.

        LengthSchedule({0: 8192, 2000: 32768, 3000: 131072})

    The data must be a PackedDataModule, whose `max_tokens` is a multiple of every length. Its rows
    are packed at `max_tokens`. In a stage of a shorter length, each row is divided into equal
    parts, which are consecutive batches of one rank; a document that crosses a border is cut there.
    The optimizer step alone decides the length, so a resumed run reads the same parts as an
    uninterrupted one. A checkpoint stores the stages, and a resumed run must have the same.

    Held-out rows keep their full length. The metric `data/packed_length`, logged at logging steps,
    is the current length. To change attention or RoPE as well, add an AttentionSchedule.

    Args:
        stages: Mapping from the first optimizer step of a stage to the number of tokens of its
            packs. The lengths rise with the steps, and one stage starts at step 0.
        learning_rate: What the learning-rate schedule counts: "steps", or "tokens". With "tokens",
            a step advances the schedule in proportion to the length of its packs, so a warmup or
            decay covers the same share of the tokens as it otherwise covers of the steps.

    Attributes:
        length_stages: The stages, which the data module reads.

    Raises:
        ValueError: if a stage or `learning_rate` is not valid. In the run: if the data are not in a
            PackedDataModule, its rows cannot be divided, or it is an endless stream.
    """

    def __init__(self, stages: dict[int, int], learning_rate: str = "steps") -> None:
        self.length_stages = LengthStages.read(stages)
        require(
            learning_rate in LEARNING_RATES,
            f"learning_rate must be one of {', '.join(LEARNING_RATES)}, got {learning_rate!r}. "
            "Choose steps if in doubt.",
        )
        self.learning_rate = learning_rate
        self._length: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks that the trainer's data can be divided.

        Raises:
            ValueError: if the data are not in a PackedDataModule, `overfit_batches` is set, or the
                number of packs of an optimizer step changes.
        """
        if stage != "fit":
            return
        data = getattr(trainer, "datamodule", None)
        require(
            isinstance(data, PackedDataModule),
            "LengthSchedule needs the data in a PackedDataModule, got "
            f"{'a data loader' if data is None else type(data).__name__}. Pass datamodule="
            "PackedDataModule(...) to Trainer.fit.",
        )
        require(
            not trainer.overfit_batches,
            f"overfit_batches must be 0 with LengthSchedule, got {trainer.overfit_batches}. Leave "
            "one of them out.",
        )
        require(
            not any(isinstance(one, GradientAccumulationScheduler) for one in trainer.callbacks),
            "LengthSchedule needs the same number of packs in every optimizer step, got a "
            "GradientAccumulationScheduler. Set accumulate_grad_batches.",
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the learning-rate schedule count tokens, if asked.

        Raises:
            ValueError: if the limited epochs of the run divide an optimizer step, a scheduler is
                not a LambdaLR, or the length of the run is unknown.
        """
        self._length = None
        epoch, loader = int(trainer.num_training_batches), trainer.train_dataloader
        packs = min(trainer.accumulate_grad_batches, len(loader))  # of a rank's optimizer step
        require(
            epoch % packs == 0 or bool(trainer.fast_dev_run),
            f"limit_train_batches must be a multiple of accumulate_grad_batches={packs} with "
            f"LengthSchedule, got {epoch} batches: the last step of an epoch would be shorter. "
            "Change one of them.",
        )
        if self.learning_rate == "steps":
            return
        steps = trainer.estimated_stepping_batches
        require(
            0 < steps < float("inf"),
            "learning_rate=tokens needs the length of the run, got none. Set max_steps.",
        )
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if not isinstance(scheduler, LambdaLR) or config.interval != "step":
                raise ValueError(
                    "learning_rate=tokens needs schedulers of the class LambdaLR that advance at "
                    f"every step, got {type(scheduler).__name__} at every {config.interval}. Use "
                    "learning_rate=steps."
                )
            scheduler.lr_lambdas = [
                self._counting_tokens(function, steps) for function in scheduler.lr_lambdas
            ]

    def _counting_tokens(
        self, function: Callable[[Any], float], steps: float
    ) -> Callable[[int], float]:
        """Returns the learning rate's factor by step, for a schedule that counts tokens.

        Args:
            function: Factor by the number of steps.
            steps: Optimizer steps of the run.
        """
        stages = self.length_stages
        total = stages.tokens_before(steps)
        return lambda step: function(steps * stages.tokens_before(step) / total)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Reports a new length."""
        length = self.length_stages.length_at(trainer.global_step)
        if length != self._length and Topology.of(trainer).is_first:
            say(f"Packs have {length:,} tokens from step {trainer.global_step} on")
        self._length = length

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs the current length, at logging steps."""
        if at_log_step(trainer) and self._length is not None:
            pl_module.log("data/packed_length", float(self._length), batch_size=1)
