"""HostAdamW: AdamW whose moments and float32 weights are in host memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer


class HostAdamW(Optimizer):
    """torch's AdamW on float32 copies of the weights in host memory.

    A step copies the gradients to the host, updates the float32 copies with torch's fused AdamW for
    CPUs, and copies them back into the weights. The GPU holds no optimizer state. If the weights
    are bfloat16, they are the rounded copies. The copies keep the small updates that bfloat16 would
    lose.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Number that is added to the denominator of an update.
        weight_decay: Decoupled weight decay.

    Raises:
        ValueError: if the parameters are sharded.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options)
        self._known = tuple(options)
        if any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            raise ValueError("HostAdamW updates whole parameters, use trainer.strategy=ddp")
        copies = [
            {**self._options(group), "params": [_on_host(p) for p in group["params"]]}
            for group in self.param_groups
        ]
        self._host = AdamW(copies, fused=True)

    def _options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {name: group[name] for name in self._known}

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the pairs of parameter and float32 copy, in the order of the groups."""
        return [
            pair
            for group, host in zip(self.param_groups, self._host.param_groups, strict=True)
            for pair in zip(group["params"], host["params"], strict=True)
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates all parameters that have a gradient. If a closure is given, it runs first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, host in zip(self.param_groups, self._host.param_groups, strict=True):
            host.update(self._options(group))
        for parameter, copy in self._pairs():
            if parameter.grad is None:
                continue
            # One gradient at a time: those of all parameters would take 4 bytes for each weight.
            copy.grad = parameter.grad.to("cpu", torch.float32)
            self._host.step()  # updates the parameters that have a gradient
            copy.grad = None
            parameter.copy_(copy)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's state dict of AdamW, with each parameter's float32 copy as "weight"."""
        found = super().state_dict()
        states = self._host.state_dict()["state"]
        found["state"] = {
            index: {**states.get(index, {}), "weight": copy.detach()}
            for index, (_, copy) in enumerate(self._pairs())
        }
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restores groups, moments and float32 copies, and sets the parameters to the copies.

        Raises:
            ValueError: if the state is not that of a HostAdamW over as many parameters.
        """
        states, pairs = state_dict["state"], self._pairs()
        if any("weight" not in states.get(index, {}) for index in range(len(pairs))):
            raise ValueError(
                "checkpoint must hold the state of optim=adamw_host, got that of another "
                "optimizer. Use the optimizer of the checkpoint's run."
            )
        super().load_state_dict({**state_dict, "state": {}})
        moments = {
            index: {name: value for name, value in state.items() if name != "weight"}
            for index, state in states.items()
        }
        moments = {index: state for index, state in moments.items() if state}
        self._host.load_state_dict({**self._host.state_dict(), "state": moments})
        for index, (parameter, copy) in enumerate(pairs):
            copy.copy_(states[index]["weight"])
            parameter.copy_(copy)


def _on_host(parameter: Tensor) -> nn.Parameter:
    """Returns a float32 copy of a parameter in host memory."""
    return nn.Parameter(parameter.detach().to("cpu", torch.float32, copy=True))
