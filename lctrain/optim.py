"""Optimizer and learning-rate schedule: what `configure_optimizers` builds from OptimConfig."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lctrain.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Builds AdamW over the trainable parameters of `model`.

    Matrices decay, embeddings among them; norms, biases and vectors do not: see `decays`. A tied
    weight is counted once.

    Args:
        model: The module whose parameters are trained.
        config: Learning rate, betas, eps and weight decay.

    Returns:
        The optimizer, with the fused update where every parameter is on one kind of device.

    Raises:
        ValueError: if the model has no trainable parameter.
    """
    owners = [
        (module, module_name, name, parameter)
        for module_name, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    decaying = {
        id(p): decays(module, outer, name, p) for module, outer, name, p in reversed(owners)
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "model must have a trainable parameter, got none. Set requires_grad on what is trained."
        )
    groups = [
        {
            "params": [p for p in trainable if decaying[id(p)]],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in trainable if not decaying[id(p)]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=all(parameter.device.type in ("cpu", "cuda") for parameter in trainable),
    )
    # A fused step can unscale the gradients of float16 itself, so Lightning refuses to clip before
    # it under mixed precision. Nothing is scaled here: float16 is refused.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


BIAS = re.compile(r"(^|_)bias(es)?(_|\d|$)")
NORM = re.compile(r"(^|_)(\w*norm\d*)(_|$)", re.IGNORECASE)


def decays(module: nn.Module, module_name: str, name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter.

    It does to matrices, and to stacks of matrices such as those of experts. It does not, whatever
    the shape, to

    - biases: the parameter or the module that holds it has `bias` in its name
      (`gate_up_proj_bias`, `relative_attention_bias.weight`);
    - norms: the class or the name of the module, or the parameter's name, says norm
      (`CohereLayerNorm`, `q_norm.weight`);
    - vectors: at most one dimension is longer than 1, outside of linear layers and embeddings;
    - what its author has marked with `_no_weight_decay`, as state space models do.

    Args:
        module: Holds the parameter directly.
        module_name: Dotted name of that module; only the last part counts.
        name: Name of the parameter in the module.
        parameter: Any shape.
    """
    own_name = module_name.rpartition(".")[2]
    if getattr(parameter, "_no_weight_decay", False) or parameter.dim() < 2:
        return False
    if BIAS.search(name) or BIAS.search(own_name):
        return False
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return True
    if NORM.search(name) or NORM.search(own_name) or "Norm" in type(module).__name__:
        return False
    return sum(size > 1 for size in parameter.shape) > 1


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


def follow_schedule(scheduler: LambdaLR) -> None:
    """Sets the learning rates to those of the schedule at the step that was restored.

    A restored optimizer has the rates of the run that was saved. If this run has another length,
    the schedule has other rates from this step on, the first included.

    Args:
        scheduler: Built for this run; its step and its peak rates are restored.
    """
    rates = [
        peak * factor(scheduler.last_epoch)
        for peak, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


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
