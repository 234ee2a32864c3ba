"""Builds the AdamW optimizer and the learning-rate schedule that OptimConfig describes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lctrain.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Builds AdamW over the trainable parameters of a model.

    Weight decay applies to matrices and embeddings, and not to norms, biases and vectors; see
    `decays`. A tied weight is in the optimizer once.

    Args:
        model: The module whose parameters are trained.
        config: Learning rate, betas, eps and weight decay.

    Returns:
        The optimizer; its update is fused if all parameters are on CPUs or CUDA GPUs.

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
    # A fused step can unscale float16 gradients itself, so Lightning refuses to clip gradients for
    # it under mixed precision. Float16 is refused here, so gradients are never scaled.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


BIAS = re.compile(r"(^|_)bias(es)?(_|\d|$)")
SCALE = re.compile(r"^(A_log|(\w+_)?scales?)$", re.IGNORECASE)
NORM = re.compile(r"(^|_)(\w*norm\d*)(_|$)", re.IGNORECASE)


def decays(module: nn.Module, module_name: str, name: str, parameter: Tensor) -> bool:
    """Returns whether weight decay applies to a parameter.

    Weight decay applies to matrices and to stacks of matrices, such as the weights of experts. It
    does not apply to these parameters:

    - biases: the name of the parameter or of its module contains `bias` (`gate_up_proj_bias`,
      `relative_attention_bias.weight`);
    - norms: the class or name of the module, or the name of the parameter, contains `norm`
      (`CohereLayerNorm`, `q_norm.weight`); linear layers and embeddings are never norms;
    - scales: the name of the parameter is `scale` or ends in `_scale`, such as the gains of each
      head, or it is `A_log`, the decay rates of a state space model;
    - vectors: parameters with at most one dimension longer than 1, except two-dimensional weights
      of linear layers and embeddings;
    - parameters with the attribute `_no_weight_decay`.

    Args:
        module: The module that holds the parameter directly.
        module_name: Dotted name of that module; only its last part is read.
        name: Name of the parameter in the module.
        parameter: The parameter, of any shape.
    """
    own_name = module_name.rpartition(".")[2]
    if getattr(parameter, "_no_weight_decay", False) or parameter.dim() < 2:
        return False
    if BIAS.search(name) or BIAS.search(own_name) or SCALE.search(name):
        return False
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return True
    if NORM.search(name) or NORM.search(own_name) or "Norm" in type(module).__name__:
        return False
    return sum(size > 1 for size in parameter.shape) > 1


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int
) -> LambdaLR:
    """Builds the learning-rate schedule of an optimizer.

    Args:
        optimizer: The optimizer whose learning rates are scheduled.
        config: Name of the schedule, warmup, decay and minimum.
        total_steps: Number of optimizer steps of the whole run.

    Returns:
        A scheduler; call its `step` after every optimizer step.

    Raises:
        ValueError: if the warmup is longer than the run.
    """
    return LambdaLR(optimizer, learning_rate_factor(config, total_steps))


def follow_schedule(scheduler: LambdaLR) -> None:
    """Sets an optimizer's learning rates to the schedule of this run, after a resume.

    The restored optimizer has the learning rates of the saved run. If this run has another length,
    its schedule has different rates at the same step.

    Args:
        scheduler: Scheduler of this run, with the step and peak learning rates of the checkpoint.
    """
    rates = [
        peak * factor(scheduler.last_epoch)
        for peak, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def learning_rate_factor(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Returns a function from the optimizer step (from 0) to the factor of the peak learning rate.

    Args:
        config: Name of the schedule, warmup, decay and minimum.
        total_steps: Number of optimizer steps of the whole run.

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
