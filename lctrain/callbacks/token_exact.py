"""TokenExactLoss: gives all tokens of an optimizer step the same weight, in any LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from lctrain.callbacks.batches import ReadBatch, view_batch
from lctrain.callbacks.override import Override
from lctrain.callbacks.targets import refuse_twin
from lctrain.distributed import Topology
from lctrain.log_steps import at_log_step
from lctrain.loss.token_window import TokenWindow
from lctrain.module import LongContextModule

Reduction = Literal["sum", "mean"]


class TokenExactLoss(pl.Callback):
    """Averages the loss over all valid tokens of an optimizer step, on all ranks.

    Lightning averages micro-batches, and DistributedDataParallel averages ranks, which gives the
    tokens of short batches more weight. With this callback, the gradient of an optimizer step is
    that of (sum of all token losses) / (number of all valid tokens), as in LongContextModule. The
    gradients are scaled before any hook, the clipping or the optimizer reads them.

    The number of tokens of a micro-batch is found in the first of these places:

    1. the entry `tokens` of the dictionary that `training_step` returns;
    2. the result of `count_tokens(batch)`;
    3. the valid labels of the batch, a PackedBatch or a mapping with transformers' names.

    In manual optimization, an optimizer step covers everything that was back-propagated since the
    optimizer's last step, and the first place is not read. `training_step` may back-propagate the
    loss in parts; the tokens of a batch are counted once per optimizer step. The parts must add up
    to the loss of the batch: its sum, or its mean over all tokens of the batch.

    A micro-batch without valid tokens adds nothing to the loss.

    Args:
        reduction: Loss that `training_step` returns: the "sum" of the token losses, or their "mean"
            over the micro-batch as in transformers.
        tokens: Name of the count in the dictionary that `training_step` returns.
        count_tokens: Function from a batch to its number of valid tokens, an int or a 0-dim tensor;
            None reads the labels.
        read_batch: Function from a batch to a PackedBatch or a mapping with transformers' names;
            None if batches are one of them.
        log: Name of the logged loss per token; None logs nothing.

    Attributes:
        last_loss: Loss per token of the last optimizer step, 0-dim float64 tensor; None before the
            first step.

    Raises:
        ValueError: if `reduction` is unknown. In `setup`: if the module divides by tokens itself,
            or there is a second TokenExactLoss, a float16 precision or a sharding strategy. At the
            start of training: if there are several optimizers. In training: if the tokens of a
            batch cannot be counted.
    """

    def __init__(
        self,
        reduction: Reduction = "sum",
        *,
        tokens: str = "num_tokens",
        count_tokens: Callable[[Any], Any] | None = None,
        read_batch: ReadBatch | None = None,
        log: str | None = "train/loss",
    ) -> None:
        if reduction not in get_args(Reduction):
            raise ValueError(
                f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}. "
                "It is what training_step returns; transformers' models return a mean."
            )
        self.reduction = reduction
        self.tokens = tokens
        self.count_tokens = count_tokens
        self.read_batch = read_batch
        self.log_as = log
        self.last_loss: Tensor | None = None
        self._window = TokenWindow()
        self._overrides: list[Override] = []
        self._batch: Any = None
        self._count: int | Tensor | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replaces `training_step` and `backward` of the module for the duration of a fit.

        Raises:
            ValueError: if the module divides by tokens itself, or there is a second TokenExactLoss,
                a float16 precision or a sharding strategy.
        """
        if stage != "fit":
            return
        refuse_twin(trainer, self)
        _refuse_module(pl_module)
        _refuse_trainer(trainer)
        self._give_back()
        self._window.discard()
        self._overrides = [
            Override(pl_module, "training_step", self._around_training_step(pl_module)),
            Override(pl_module, "backward", self._around_backward(trainer, pl_module)),
        ]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that there is one optimizer.

        Raises:
            ValueError: if there are several, so that the micro-batches of a step are ambiguous.
        """
        if len(trainer.optimizers) > 1:
            raise ValueError(
                f"TokenExactLoss needs one optimizer, got {len(trainer.optimizers)}: a window "
                "belongs to one of them. Divide the losses in training_step instead."
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch, whose tokens are counted later."""
        self._batch, self._count = batch, None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Scales the gradients if `backward` has not done so.

        This is needed in manual optimization, and if the last micro-batch returned no loss.
        """
        if self._window.open:
            micro_batches = trainer.accumulate_grad_batches
            self._close(trainer, pl_module, micro_batches)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs the loss per token at logging steps."""
        self._batch = None
        if self.log_as is not None and self.last_loss is not None and at_log_step(trainer):
            pl_module.log(self.log_as, self.last_loss.float(), batch_size=1)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restores the methods of the module."""
        self._give_back()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Restores the methods of the module after an error."""
        self._give_back()

    def _around_training_step(self, pl_module: pl.LightningModule) -> Any:
        def make(training_step: Any) -> Any:
            def step(*args: Any, **kwargs: Any) -> Any:
                output = training_step(*args, **kwargs)
                loss = output.get("loss") if isinstance(output, dict) else output
                if pl_module.automatic_optimization and isinstance(loss, Tensor):
                    self._count = self._tokens_of(output)
                    self._add(loss)
                return output

            return step

        return make

    def _around_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        def make(backward: Any) -> Any:
            def step(loss: Tensor, *args: Any, **kwargs: Any) -> None:
                if not pl_module.automatic_optimization:
                    first = self._count is None  # part of the batch's loss in this window
                    self._count = self._tokens_of(None) if first else self._count
                    self._add(loss, counted=not first)
                if self.reduction == "mean":
                    assert self._count is not None
                    loss = _sum_of(loss, self._count)
                backward(loss, *args, **kwargs)
                if pl_module.automatic_optimization and not trainer.fit_loop._should_accumulate():
                    self._close(trainer, pl_module, trainer.accumulate_grad_batches)

            return step

        return make

    def _add(self, loss: Tensor, counted: bool = False) -> None:
        """Adds a loss to the optimizer step, and the batch's tokens unless already counted."""
        assert self._count is not None
        loss = loss.detach()
        if loss.dim() != 0:
            raise ValueError(
                f"training_step must return a loss of one number, got shape {tuple(loss.shape)}. "
                "Sum the token losses."
            )
        loss_sum = _sum_of(loss, self._count) if self.reduction == "mean" else loss
        self._window.add(loss_sum, 0 if counted else self._count)

    def _tokens_of(self, output: Any) -> int | Tensor:
        """Returns the number of valid tokens in this micro-batch, an int or a 0-dim tensor.

        Args:
            output: The output of `training_step`; None in manual optimization.
        """
        count: Any
        if isinstance(output, dict) and self.tokens in output:
            count = output[self.tokens]
        elif self.count_tokens is not None:
            count = self.count_tokens(self._batch)
        else:
            count = view_batch(self._batch, self.read_batch).num_valid_tokens()
        if isinstance(count, Tensor) and count.numel() == 1:
            return count.detach().reshape(())
        if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
            return count
        raise ValueError(
            f"{self.tokens} must be a number of tokens, an int or a 0-dim tensor, got {count!r}. "
            "Count the labels that are not -100."
        )

    def _close(self, trainer: pl.Trainer, pl_module: pl.LightningModule, averaged: int) -> None:
        ranks = Topology.of(trainer)
        self._window.close(pl_module.parameters(), averaged * ranks.size, ranks)
        self.last_loss = self._window.last_loss
        self._count = None

    def _give_back(self) -> None:
        for override in reversed(self._overrides):
            override.restore()
        self._overrides = []


def _sum_of(mean: Tensor, count: int | Tensor) -> Tensor:
    """Returns the summed loss from a mean over `count` tokens; 0 if `count` is 0."""
    if isinstance(count, Tensor):
        return torch.where((count == 0).to(mean.device), 0.0, mean * count)
    return mean * count if count else mean.nan_to_num(0.0, 0.0, 0.0) * 0


def _refuse_module(pl_module: pl.LightningModule) -> None:
    if isinstance(pl_module, LongContextModule):
        raise ValueError(
            f"TokenExactLoss must not be given to {type(pl_module).__name__}, which divides by the "
            "tokens of the window itself. Remove the callback."
        )


def _refuse_trainer(trainer: pl.Trainer) -> None:
    if str(trainer.precision).startswith(("16", "transformer-engine-float16")):
        raise ValueError(
            f"precision must be 32-true, bf16-mixed or bf16-true for TokenExactLoss, got "
            f"{trainer.precision!r}. A loss summed over a long pack overflows float16; use "
            "bf16-mixed."
        )
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            "strategy must be a single device or ddp for TokenExactLoss, got "
            f"{type(trainer.strategy).__name__}, which shards gradients or accumulates them "
            "itself. Use strategy='ddp'."
        )
