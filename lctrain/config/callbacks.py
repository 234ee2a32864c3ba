"""The settings of the callbacks. Each schema names the callback's class in `_target_`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lctrain.config.paths import expand_paths
from lctrain.config.schema import MISSING
from lctrain.config.tasks import NeedleConfig, PasskeyConfig, RulerConfig
from lctrain.limits import require


@dataclass(frozen=True)
class CheckpointConfig:
    """Settings of `lctrain.callbacks.StepCheckpoint`, which saves checkpoints by optimizer step.

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
    """Settings of `lctrain.callbacks.ThroughputMonitor`, which logs the speed of training.

    Attributes:
        max_tokens: Capacity of a row in tokens, for the logged fraction of the capacity that is
            filled; None does not log this fraction.
    """

    _target_: str = "lctrain.callbacks.ThroughputMonitor"
    max_tokens: int | None = None


@dataclass(frozen=True)
class IsolationConfig:
    """Settings of `lctrain.callbacks.IsolationCheck`, which checks that documents stay separate."""

    _target_: str = "lctrain.callbacks.IsolationCheck"


@dataclass(frozen=True)
class NonFiniteGuardConfig:
    """Settings of `lctrain.callbacks.NonFiniteLossGuard`, which acts on NaN and infinity.

    Attributes:
        on_batch: Action after a loss or gradient that is not finite: "stop" the run, or "skip" the
            optimizer step.
        max_in_a_row: Number of consecutive steps that may be skipped; one more stops the run.
    """

    _target_: str = "lctrain.callbacks.NonFiniteLossGuard"
    on_batch: str = "stop"
    max_in_a_row: int = 10


@dataclass(frozen=True)
class LongContextEvalConfig:
    """Settings of `lctrain.callbacks.LongContextEval`, tasks of lctrain-eval during training.

    Attributes:
        lengths: Context lengths in tokens.
        every_n_steps: Optimizer steps between two evaluations.
        tasks: Names of tasks of lctrain-eval.
        budget_s: Seconds that one evaluation may take; None for no limit.
        max_tokens: Tokens in a forward pass; None takes the longest length.
        documents: Number of held-out documents, the longest first; None for all.
        passkey: Settings of the task passkey; None for five keys at three depths.
        needle: Settings of the task needle; None for two needles at three depths.
        ruler: Settings of the task ruler; None for two prompts of each task.
        cache_gib: Most memory in GiB of the keys and values of prompts that are answered. None
            leaves as much of a GPU free as the training has needed at its peak.
    """

    _target_: str = "lctrain.callbacks.LongContextEval"
    lengths: list[int] = field(default_factory=lambda: [256, 1024, 4096])
    every_n_steps: int = 500
    tasks: list[str] = field(default_factory=lambda: ["perplexity"])
    budget_s: float | None = None
    max_tokens: int | None = None
    documents: int | None = 16
    passkey: PasskeyConfig | None = None
    needle: NeedleConfig | None = None
    ruler: RulerConfig | None = None
    cache_gib: float | None = None


@dataclass(frozen=True)
class LengthPerplexityConfig:
    """Settings of `lctrain.callbacks.LengthPerplexity`, perplexity by length during training.

    Attributes:
        lengths: Context lengths in tokens.
        every_n_steps: Optimizer steps between two measurements.
        max_tokens: Tokens in a forward pass; None takes the longest length.
        documents: Number of held-out documents, the longest first.
        begin_token: Whether each window begins with the begin token. None does so if the tokenizer
            adds a begin token to texts.
    """

    _target_: str = "lctrain.callbacks.LengthPerplexity"
    lengths: list[int] = field(default_factory=lambda: [256, 1024, 4096])
    every_n_steps: int = 500
    max_tokens: int | None = None
    documents: int = 16
    begin_token: bool | None = None


@dataclass(frozen=True)
class AttentionScheduleConfig:
    """Settings of `lctrain.callbacks.AttentionSchedule`, which changes the attention at set steps.

    Use it with attention=none, since the callback patches the model.

    Attributes:
        stages: Settings of each stage, by the stage's first optimizer step: `attention`, options of
            the attention, and `rope`.
    """

    _target_: str = "lctrain.callbacks.AttentionSchedule"
    stages: Any = MISSING


@dataclass(frozen=True)
class LengthScheduleConfig:
    """Settings of `lctrain.callbacks.LengthSchedule`, which grows the packed length.

    Attributes:
        stages: Number of tokens of a pack, by the first optimizer step of the stage. The lengths
            rise, and divide data.max_tokens.
        learning_rate: What the learning-rate schedule counts: "steps" or "tokens".
    """

    _target_: str = "lctrain.callbacks.LengthSchedule"
    stages: Any = MISSING
    learning_rate: str = "steps"


@dataclass(frozen=True)
class BestCheckpointConfig:
    """Settings of Lightning's `ModelCheckpoint`, which keeps the best checkpoints by a metric.

    Attributes:
        dirpath: Folder of the checkpoints.
        monitor: Logged metric that is compared.
        mode: "min" if the smallest value of the metric is best, "max" if the largest is.
        save_top_k: Number of best checkpoints that stay on disk.
        filename: Pattern of the file's name.
        auto_insert_metric_name: Whether Lightning writes the metric's name into the file's name.
        save_on_train_epoch_end: Whether Lightning saves after training epochs instead of
            validations.
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
    """Settings of Lightning's `EarlyStopping`, which stops a run that no longer improves.

    Attributes:
        monitor: Logged metric that is compared.
        mode: "min" if the smallest value of the metric is best, "max" if the largest is.
        patience: Number of validations without an improvement after which training stops.
        min_delta: Smallest change that counts as an improvement.
        check_on_train_epoch_end: Whether Lightning checks after training epochs instead of
            validations.
    """

    _target_: str = "lightning.pytorch.callbacks.EarlyStopping"
    monitor: str = "val/loss"
    mode: str = "min"
    patience: int = 3
    min_delta: float = 0.0
    check_on_train_epoch_end: bool = False


@dataclass(frozen=True)
class ProgressBarConfig:
    """Settings of `lctrain.callbacks.TokenProgressBar`.

    Attributes:
        refresh_rate: Optimizer steps between two refreshes; 0 hides the bar.
    """

    _target_: str = "lctrain.callbacks.TokenProgressBar"
    refresh_rate: int = 1
