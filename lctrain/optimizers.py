"""Finds an optimizer's class by its name, checks its options, and joins two optimizers."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch.optim import Optimizer

from lctrain.config import OptimConfig

_REFUSED = {
    "torchao.optim.CPUOffloadOptimizer": "which copies them before they are divided by the tokens "
    "of the step and clipped. Use optim=adamw_host"
}
"""Optimizers that give wrong updates -> the reason and the remedy."""


def optimizer_class(target: str) -> type[Optimizer]:
    """Returns the class of an optimizer.

    Args:
        target: Dotted name of the class, such as "torch.optim.AdamW".

    Raises:
        ValueError: if the name is not that of an optimizer, or the class cannot be used with
            packed batches.
    """
    module_name, _, name = target.rpartition(".")
    if target in _REFUSED:
        raise ValueError(
            f"optim._target_ must read gradients in its step, got {target!r}, {_REFUSED[target]}."
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        package = module_name.partition(".")[0]
        missing = importlib.util.find_spec(package) is None
        remedy = f"pip install {package}" if missing else "install what it needs"
        raise ValueError(
            f"optim._target_ must be a class that can be imported, got {target!r} ({error}). Check "
            f"the spelling, or install the package: {remedy}."
        ) from error
    kind = getattr(module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)) or kind is Optimizer:
        raise ValueError(
            f"optim._target_ must be a torch.optim.Optimizer, got {target!r}. "
            f"{_suggestion(name, module)}"
        )
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optim._target_ must be an optimizer that reads each gradient once, got {target!r}, "
            "which computes the loss several times per step. Use torch.optim.AdamW."
        )
    return kind


def _suggestion(name: str, module: Any) -> str:
    names = [key for key, value in vars(module).items() if _is_optimizer(value)]
    close = difflib.get_close_matches(name, names, 1)
    if close:
        return f"Did you mean {module.__name__}.{close[0]}?"
    return "Check the spelling; torch.optim.AdamW is one."


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer


def parameters_of(kind: type[Optimizer]) -> Mapping[str, inspect.Parameter]:
    """Returns the arguments of an optimizer's constructor by name, without `params`.

    A constructor with `**kwargs` passes them on to the next class, whose parameters are added.
    """
    found: dict[str, inspect.Parameter] = {}
    for owner in kind.__mro__[: kind.__mro__.index(Optimizer)]:
        if "__init__" not in vars(owner):
            continue
        own = dict(inspect.signature(vars(owner)["__init__"]).parameters)
        found = own | {name: p for name, p in found.items() if not _is_open(p)}
        if not any(map(_is_open, own.values())):
            break
    return {name: p for name, p in found.items() if name not in ("self", "params")}


def _is_open(parameter: inspect.Parameter) -> bool:
    return parameter.kind is inspect.Parameter.VAR_KEYWORD


def takes_any_name(kind: type[Optimizer]) -> bool:
    """Returns whether the constructor takes arguments of any name, as `**kwargs` does."""
    return any(map(_is_open, parameters_of(kind).values()))


def has_moments(kind: type[Optimizer]) -> bool:
    """Returns whether a class has two decay rates and an eps, as AdamW has."""
    known = parameters_of(kind)
    betas = known["betas"].default if "betas" in known else None
    eps = known["eps"].default if "eps" in known else None
    return isinstance(betas, tuple) and len(betas) == 2 and isinstance(eps, float)


def check_optimizer(config: OptimConfig) -> None:
    """Raises ValueError if the optimizer's class does not exist or does not take the options.

    An option at its default is not checked if the class has no such argument.

    Args:
        config: Options of the optimizer.
    """
    kind = optimizer_class(config._target_)
    known = parameters_of(kind)
    any_name = takes_any_name(kind)
    for name in config.arguments:
        if name not in known and not any_name:
            close = difflib.get_close_matches(name, known, 1)
            raise ValueError(
                f"optim.arguments must be arguments of {config._target_} ({', '.join(known)}), got "
                f"{name!r}. {f'Did you mean {close[0]}?' if close else 'Remove it.'}"
            )
    if not has_moments(kind) and not config.matrices_only:
        for field in fields(config):
            value = getattr(config, field.name)
            if field.name in ("beta1", "beta2", "eps") and value != field.default:
                raise ValueError(
                    f"optim.{field.name} must be left out for {config._target_}, which has no "
                    f"betas and eps like AdamW's, got {value}. Use optim.arguments."
                )
    own = [name for name in ("state_dict", "load_state_dict") if _has_own(kind, name)]
    if config.matrices_only and own:
        raise ValueError(
            f"optim.matrices_only must be false for {config._target_}, which saves its state in a "
            "way of its own and cannot be joined with AdamW, got true. Set "
            "optim.matrices_only=false."
        )
    if has_moments(kind) and "eps" in config.arguments:
        raise ValueError(
            f"optim.arguments must not hold eps for {config._target_}, got "
            f"{config.arguments['eps']!r}. Set optim.eps."
        )
    if "weight_decay" not in known and not any_name and config.weight_decay > 0.0:
        raise ValueError(
            f"optim.weight_decay must be 0 for {config._target_}, which has none, got "
            f"{config.weight_decay}. Set optim.weight_decay=0."
        )


def _has_own(kind: type[Optimizer], method: str) -> bool:
    """Returns whether an optimizer's class replaces a method of torch's Optimizer."""
    return getattr(kind, method) is not getattr(Optimizer, method)


class OptimizerPair(Optimizer):
    """Joins optimizers of disjoint parameters into one, whose state is saved and loaded as a whole.

    Args:
        optimizers: Optimizers that have not stepped yet, and whose state is in `state`.

    Attributes:
        optimizers: The joined optimizers. They share this optimizer's state and parameter groups.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        self._counts = [len(optimizer.param_groups) for optimizer in self.optimizers]
        super().__init__([group for one in self.optimizers for group in one.param_groups], {})
        self._link()

    def _link(self) -> None:
        """Gives each optimizer its part of the groups, and the common state."""
        begin = 0
        for optimizer, count in zip(self.optimizers, self._counts, strict=True):
            optimizer.param_groups = self.param_groups[begin : begin + count]
            optimizer.state = self.state
            begin += count

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates all parameters, after one call of the closure if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restores the state of all optimizers."""
        super().load_state_dict(dict(state_dict))
        self._link()
