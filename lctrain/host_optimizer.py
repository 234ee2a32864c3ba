"""HostAdamW: AdamW whose moments and float32 weights are in host memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

_OPTIONS = ("lr", "betas", "eps", "weight_decay")


class HostAdamW(Optimizer):
    """torch's AdamW on float32 copies of the weights in host memory.

    A step copies the gradients to the host, updates the float32 copies with torch's fused AdamW for
    CPUs, and copies them back into the weights. The GPU holds no optimizer state. If the weights
    are bfloat16, they are the rounded copies. The copies keep the small updates that bfloat16 would
    lose.

    The first step makes the copies. Every step compares the weights with them, and takes over
    weights that something else has changed, such as `model.load_state_dict`.

    Its state dict can be loaded into a HostAdamW only. torch.optim.AdamW reads it without an error,
    but rounds the float32 copies to the dtype of the weights and does not use them.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Number that is added to the denominator of an update.
        weight_decay: Decoupled weight decay.

    Raises:
        ValueError: if the parameters are sharded, or an option is out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        # Not in `self.state`, which Lightning moves to the GPU when it restores a checkpoint.
        self._inner: dict[Tensor, AdamW] = {}
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inner": self._inner}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, with options of its own.

        Raises:
            ValueError: if the parameters are sharded, or an option is out of range.
        """
        AdamW([torch.zeros(1)], **_options({**self.defaults, **param_group}))  # checks the options
        super().add_param_group(param_group)
        if any(isinstance(parameter, DTensor) for parameter in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ValueError(
                "params must be whole for HostAdamW, got DTensors. Use trainer.strategy=ddp."
            )

    def _parameters(self) -> list[Tensor]:
        """Returns the parameters in the order of the groups."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _updater(self, parameter: Tensor) -> AdamW:
        """Returns the AdamW of a parameter's copy, which holds the parameter's present weights."""
        held = parameter.detach().to("cpu")
        inner = self._inner.get(parameter)
        if inner is None:
            # One AdamW for each parameter: a step of one for all would look at all of them.
            weights = nn.Parameter(held.to(torch.float32, copy=True))
            inner = self._inner[parameter] = AdamW([weights], fused=True)
        copy = _copy_of(inner)
        rounded = copy.detach().to(parameter.dtype)
        if not torch.equal(held, rounded):
            changed = held != rounded
            copy.detach()[changed] = held[changed].to(torch.float32)
        return inner

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates all parameters that have a gradient. If a closure is given, it runs first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                inner = self._updater(parameter)
                inner.param_groups[0].update(_options(group))
                copy = _copy_of(inner)
                # One gradient at a time: those of all parameters would take 4 bytes a weight.
                copy.grad = parameter.grad.to("cpu", torch.float32)
                inner.step()
                copy.grad = None
                parameter.copy_(copy.to(parameter.dtype))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's state dict of AdamW, with each parameter's float32 copy as "weight"."""
        found = super().state_dict()
        found["state"] = {}
        for index, parameter in enumerate(self._parameters()):
            inner = self._updater(parameter)
            copy = _copy_of(inner)
            found["state"][index] = {**inner.state.get(copy, {}), "weight": copy.detach()}
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restores groups, moments and float32 copies, and sets the parameters to the copies.

        Raises:
            ValueError: if the state is not that of a HostAdamW over parameters of the same shapes.
                Nothing is changed then.
        """
        parameters = self._parameters()
        states = [state_dict["state"].get(index, {}) for index in range(len(parameters))]
        if any("weight" not in state for state in states):
            raise ValueError(
                "checkpoint must hold the state of optim=adamw_host, got that of another "
                "optimizer. Use the optimizer of the checkpoint's run."
            )
        for index, (parameter, state) in enumerate(zip(parameters, states, strict=True)):
            for name, value in state.items():
                if name != "step" and value.shape != parameter.shape:
                    raise ValueError(
                        f"checkpoint must hold {name} of shape {tuple(parameter.shape)} for the "
                        f"optimizer's parameter {index}, got {tuple(value.shape)}. Use the model "
                        "of the checkpoint's run."
                    )
        super().load_state_dict({**state_dict, "state": {}})
        self._inner.clear()
        for parameter, state in zip(parameters, states, strict=True):
            parameter.copy_(state["weight"].to(parameter.dtype))
            inner = self._updater(parameter)
            _copy_of(inner).copy_(state["weight"])
            moments = {name: value for name, value in state.items() if name != "weight"}
            if moments:
                inner.load_state_dict({**inner.state_dict(), "state": {0: moments}})


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns AdamW's options of a parameter group."""
    return {name: group[name] for name in _OPTIONS}


def _copy_of(inner: AdamW) -> Tensor:
    """Returns the float32 copy that an AdamW updates."""
    copy: Tensor = inner.param_groups[0]["params"][0]
    return copy
