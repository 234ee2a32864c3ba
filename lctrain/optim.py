"""Optimizer and learning-rate schedule: what `configure_optimizers` builds from OptimConfig."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lctrain.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Builds AdamW over the trainable parameters of `model`.

    Matrices decay; vectors (norm weights, biases) do not. A tied weight is counted once.

    Args:
        model: The module whose parameters are trained.
        config: Learning rate, betas, eps and weight decay.

    Returns:
        The optimizer, with the fused update where every parameter is on one kind of device.

    Raises:
        ValueError: if the model has no trainable parameter.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "model must have a trainable parameter, got none. Set requires_grad on what is trained."
        )
    matrices = [parameter for parameter in trainable if parameter.dim() >= 2]
    vectors = [parameter for parameter in trainable if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=all(parameter.device.type in ("cpu", "cuda") for parameter in trainable),
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int
) -> LambdaLR:
    """Builds the schedule over optimizer steps.

    Args:
        optimizer: Whose learning rates are scaled.
        config: The name of the schedule and its shape.
        total_steps: Optimizer steps of the whole run.

    Returns:
        A scheduler to be stepped after every optimizer step.

    Raises:
        ValueError: if the warmup is longer than the run.
    """
    return LambdaLR(optimizer, learning_rate_factor(config, total_steps))


def learning_rate_factor(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Returns the factor on the learning rate as a function of the optimizer step (from 0).

    Args:
        config: The name of the schedule and its shape.
        total_steps: Optimizer steps of the whole run.

    Raises:
        ValueError: if the warmup is longer than the run.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_fraction * total_steps)
    if warmup > total_steps:
        raise ValueError(
            f"optim.warmup_steps must be at most the {total_steps} steps of the run, got "
            f"{warmup}. Shorten the warmup or train longer."
        )
    floor = config.min_learning_rate_ratio

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if config.schedule == "cosine":
            return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
        if config.schedule == "linear":
            return floor + (1.0 - floor) * (1.0 - progress)
        if config.schedule == "warmup_stable_decay":
            decay = max(0.0, progress - (1.0 - config.decay_fraction)) / config.decay_fraction
            return floor + (1.0 - floor) * (1.0 - decay)
        return 1.0

    return factor
