"""The settings of the callbacks, each with the class that it builds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lctrain.config.paths import expand_paths
from lctrain.config.schema import MISSING
from lctrain.limits import require


@dataclass(frozen=True)
class CheckpointConfig:
    """`lctrain.callbacks.StepCheckpoint`.

    Attributes:
        directory: Folder of the checkpoints.
        every_n_steps: Optimizer steps between two checkpoints.
        keep: Number of newest checkpoints that stay on disk.
    """

    _target_: str = "lctrain.callbacks.StepCheckpoint"
    directory: str = MISSING
    every_n_steps: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        expand_paths(self, "callbacks.checkpoint.", "directory")
        for name in ("every_n_steps", "keep"):
            value = getattr(self, name)
            require(
                value >= 1,
                f"callbacks.checkpoint.{name} must be at least 1, got {value}. Use "
                "callbacks.checkpoint=null for no checkpoints.",
            )


@dataclass(frozen=True)
class ThroughputConfig:
    """`lctrain.callbacks.ThroughputMonitor`.

    Attributes:
        max_tokens: Capacity of a row, to which the fill refers; None measures no fill.
    """

    _target_: str = "lctrain.callbacks.ThroughputMonitor"
    max_tokens: int | None = None


@dataclass(frozen=True)
class IsolationConfig:
    """`lctrain.callbacks.IsolationCheck`."""

    _target_: str = "lctrain.callbacks.IsolationCheck"


@dataclass(frozen=True)
class NonFiniteGuardConfig:
    """`lctrain.callbacks.NonFiniteLossGuard`.

    Attributes:
        on_batch: Action after a loss or gradient that is not finite: "stop" the run, or "skip" the
            optimizer step.
        max_in_a_row: Steps that may be skipped one after the other; one more stops the run.
    """

    _target_: str = "lctrain.callbacks.NonFiniteLossGuard"
    on_batch: str = "stop"
    max_in_a_row: int = 10


@dataclass(frozen=True)
class LengthPerplexityConfig:
    """`lctrain.callbacks.LengthPerplexity`.

    Attributes:
        lengths: Context lengths in tokens.
        every_n_steps: Optimizer steps between two measurements.
        max_tokens: Tokens in a forward pass; None takes the longest length.
        documents: Number of held-out documents, the longest first.
        begin_token: Whether each window begins with the begin token; None where the tokenizer adds
            one to a text.
    """

    _target_: str = "lctrain.callbacks.LengthPerplexity"
    lengths: list[int] = field(default_factory=lambda: [256, 1024, 4096])
    every_n_steps: int = 500
    max_tokens: int | None = None
    documents: int = 16
    begin_token: bool | None = None


@dataclass(frozen=True)
class AttentionScheduleConfig:
    """`lctrain.callbacks.AttentionSchedule`; attention=none leaves the patching to it.

    Attributes:
        stages: The first optimizer step of each stage, and its description: `attention`, its
            options, and `rope`.
    """

    _target_: str = "lctrain.callbacks.AttentionSchedule"
    stages: Any = MISSING


@dataclass(frozen=True)
class BestCheckpointConfig:
    """Lightning's `ModelCheckpoint`, after validations.

    Attributes:
        dirpath: Folder of the checkpoint.
        monitor: Logged metric that decides.
        mode: min or max: which value of the metric is best.
        save_top_k: Number of best checkpoints that stay on disk.
        filename: Name of the file, with the step.
        auto_insert_metric_name: Whether Lightning writes the metric's name into the file's name.
        save_on_train_epoch_end: Whether Lightning saves after a training epoch, too.
    """

    _target_: str = "lightning.pytorch.callbacks.ModelCheckpoint"
    dirpath: str = MISSING
    monitor: str = "val/loss"
    mode: str = "min"
    save_top_k: int = 1
    filename: str = "best-{step:08d}"
    auto_insert_metric_name: bool = False
    save_on_train_epoch_end: bool = False

    def __post_init__(self) -> None:
        expand_paths(self, "callbacks.best_checkpoint.", "dirpath")


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """Lightning's `EarlyStopping`, after validations.

    Attributes:
        monitor: Logged metric that decides.
        mode: min or max: which value of the metric is best.
        patience: Validations without an improvement after which training stops.
        min_delta: Smallest change that counts as an improvement.
        check_on_train_epoch_end: Whether Lightning checks after a training epoch, too.
    """

    _target_: str = "lightning.pytorch.callbacks.EarlyStopping"
    monitor: str = "val/loss"
    mode: str = "min"
    patience: int = 3
    min_delta: float = 0.0
    check_on_train_epoch_end: bool = False


@dataclass(frozen=True)
class ProgressBarConfig:
    """`lctrain.callbacks.TokenProgressBar`.

    Attributes:
        refresh_rate: Optimizer steps between two refreshes; 0 hides the bar.
    """

    _target_: str = "lctrain.callbacks.TokenProgressBar"
    refresh_rate: int = 1
