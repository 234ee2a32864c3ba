"""The settings of the optimizer and its learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lctrain.limits import require

TYPED = {
    "lr": "optim.learning_rate",
    "weight_decay": "optim.weight_decay",
    "betas": "optim.beta1 and optim.beta2",
}
"""Arguments of optimizers that have a key of their own -> that key."""
HOST_ADAMW = "lctrain.host_optimizer.HostAdamW"
"""Dotted name of the AdamW of optim=adamw_host, whose states are in host memory."""
SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")


@dataclass(frozen=True)
class OptimConfig:
    """Settings of the optimizer and its learning-rate schedule.

    Attributes:
        _target_: Class of the optimizer, such as torch.optim.AdamW. Parameters that do not decay
            are in a group of their own.
        arguments: Further arguments of the class, such as {momentum: 0.9}.
        matrices_only: True if the class updates only the matrices between embeddings and output
            projection, and AdamW updates the other parameters. Muon needs it.
        learning_rate: Peak learning rate.
        beta1: Decay rate of the running mean of gradients, as in AdamW.
        beta2: Decay rate of the running mean of squared gradients, as in AdamW.
        eps: Number added to the denominator of an update, as in AdamW.
        weight_decay: Weight decay of matrices, embeddings included; decoupled from the gradient in
            AdamW. Biases, norms and vectors have none.
        schedule: Learning-rate schedule: cosine, linear, constant or warmup_stable_decay.
        warmup_steps: Number of optimizer steps of the linear warmup; None takes warmup_fraction.
        warmup_fraction: Fraction of the run's steps that are warmup.
        decay_fraction: Fraction of the steps after warmup in which the learning rate falls
            (warmup_stable_decay only).
        min_learning_rate_ratio: Final learning rate divided by the peak learning rate.
    """

    _target_: str = "torch.optim.AdamW"
    arguments: dict[str, Any] = field(default_factory=dict)
    matrices_only: bool = False
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    schedule: str = "cosine"
    warmup_steps: int | None = None
    warmup_fraction: float = 0.1
    decay_fraction: float = 0.2
    min_learning_rate_ratio: float = 0.1

    def __post_init__(self) -> None:
        require(
            "." in self._target_.strip("."),
            f"optim._target_ must be a class with its module, got {self._target_!r}. Write for "
            "example torch.optim.AdamW.",
        )
        for name in self.arguments:
            require(
                name not in TYPED,
                f"optim.arguments must not hold {name}, got {self.arguments.get(name)!r}. Set "
                f"{TYPED.get(name)}.",
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"optim.schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}. "
                "Check the spelling."
            )
        for name in ("learning_rate", "weight_decay", "eps"):
            value = getattr(self, name)
            require(not math.isinf(value), f"optim.{name} must be finite, got {value}. Lower it.")
        require(
            self.learning_rate > 0.0,
            f"optim.learning_rate must be above 0, got {self.learning_rate}. Try 1e-3.",
        )
        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            require(
                0.0 <= beta < 1.0,
                f"optim.{name} must be in [0, 1), got {beta}. It is the share of a moment that a "
                "step keeps.",
            )
        for name in ("eps", "weight_decay"):
            value = getattr(self, name)
            require(
                value >= 0.0,
                f"optim.{name} must be at least 0, got {value}. Leave it out or use 0.",
            )
        require(
            0.0 <= self.warmup_fraction < 1.0,
            f"optim.warmup_fraction must be in [0, 1), got {self.warmup_fraction}. It is the share "
            "of the steps that warm up.",
        )
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"optim.warmup_steps must be at least 0, got {self.warmup_steps}. Use null for a share "
            "of the run, optim.warmup_fraction.",
        )
        require(
            0.0 < self.decay_fraction <= 1.0,
            f"optim.decay_fraction must be in (0, 1], got {self.decay_fraction}. It is the share "
            "of the steps after the warmup that decay.",
        )
        require(
            0.0 <= self.min_learning_rate_ratio <= 1.0,
            f"optim.min_learning_rate_ratio must be in [0, 1], got {self.min_learning_rate_ratio}. "
            "It is the last learning rate over the peak.",
        )
