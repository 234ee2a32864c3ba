"""Builds the optimizer and the learning-rate schedule that OptimConfig describes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lctrain.config import OptimConfig
from lctrain.optimizers import (
    OptimizerPair,
    check_optimizer,
    has_moments,
    optimizer_class,
    parameters_of,
    takes_any_name,
)
from lctrain.pluralize import pluralize


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Builds the optimizer over the trainable parameters of a model.

    Weight decay applies to matrices and embeddings, and not to norms, biases and vectors; see
    `decays`. A tied weight is in the optimizer once.

    Args:
        model: The module whose parameters are trained.
        config: Class of the optimizer, learning rate, betas, eps and weight decay.

    Returns:
        The optimizer. The update of AdamW, Adam and SGD is fused if all parameters are on CPUs or
        CUDA GPUs.

    Raises:
        ValueError: if the model has no trainable parameter, or `check_optimizer` or the class
            refuses the options.
    """
    check_optimizer(config)
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
    kind = optimizer_class(config._target_)
    if config.matrices_only:
        inside = _inner_matrices(model, decaying)
        matrices = [parameter for parameter in trainable if id(parameter) in inside]
        others = [parameter for parameter in trainable if id(parameter) not in inside]
        if not matrices:
            raise ValueError(
                "optim.matrices_only needs trainable matrices between embeddings and output "
                "projection, got none. Set optim.matrices_only=false."
            )
        adamw = replace(config, _target_="torch.optim.AdamW", arguments={})
        parts = [_build(kind, [{"params": matrices, "weight_decay": config.weight_decay}], config)]
        if others:
            groups = _decay_groups(others, decaying, config.weight_decay)
            parts.append(_build(torch.optim.AdamW, groups, adamw))
        optimizer: torch.optim.Optimizer = OptimizerPair(parts)
    else:
        optimizer = _build(kind, _decay_groups(trainable, decaying, config.weight_decay), config)
    # A fused step can unscale float16 gradients itself, so Lightning refuses to clip gradients for
    # it under mixed precision. Float16 is refused here, so gradients are never scaled.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def _decay_groups(
    parameters: Sequence[nn.Parameter], decaying: Mapping[int, bool], weight_decay: float
) -> list[dict[str, Any]]:
    """Returns two parameter groups, with and without weight decay; empty groups are left out."""
    groups = [
        {"params": [p for p in parameters if decaying[id(p)]], "weight_decay": weight_decay},
        {"params": [p for p in parameters if not decaying[id(p)]], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _inner_matrices(model: nn.Module, decaying: Mapping[int, bool]) -> set[int]:
    """Returns the ids of decaying matrices, without embeddings and the output projection."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    outside = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outside += [] if output is None else [output]
    excluded = {id(p) for module in outside for p in module.parameters(recurse=False)}
    return {
        id(p)
        for p in model.parameters()
        if p.dim() == 2 and decaying[id(p)] and id(p) not in excluded
    }


def _build(
    kind: type[torch.optim.Optimizer], groups: list[dict[str, Any]], config: OptimConfig
) -> torch.optim.Optimizer:
    """Builds an optimizer of a class over parameter groups."""
    known = parameters_of(kind)
    options: dict[str, Any] = {"lr": config.learning_rate, **config.arguments}
    if has_moments(kind):
        options["betas"] = (config.beta1, config.beta2)
        options.setdefault("eps", config.eps)
    if "weight_decay" not in known and not takes_any_name(kind):
        groups = [{"params": [p for group in groups for p in group["params"]]}]
    if kind in FUSED and not {"fused", "foreach", "differentiable"} & options.keys():
        devices = {p.device.type for group in groups for p in group["params"]}
        options["fused"] = devices <= {"cpu", "cuda"}
    try:
        return kind(groups, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"optim must fit {config._target_}, got: {str(error).rstrip('.')}. Correct "
            "optim.arguments; a class for matrices alone, such as Muon, needs "
            "optim.matrices_only=true."
        ) from error


FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


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
    """After a resume, sets an optimizer's learning rates to the schedule of this run.

    The restored optimizer has the learning rates of the saved run. If this run has another length,
    its schedule has different rates at the same step.

    Args:
        scheduler: Scheduler of this run. Its step and peak learning rates were restored from the
            checkpoint.
    """
    rates = [
        peak * factor(scheduler.last_epoch)
        for peak, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):  # such as that of torchao's optimizers
            group["lr"].fill_(rate)
        else:
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
            f"optim.warmup_steps must be at most the {pluralize(total_steps, 'step')} of the run, "
            "got "
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
