"""JoinedProjections: the linear layers on one input as one matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.distributed.gather import free_bytes
from lctrain.models.fused_modules import JOINED_WEIGHTS, GatedMLP, is_plain_linear, projections
from lctrain_kernels.autocast import autocast_dtype

SHARE = 1 / 16
"""Share of a GPU's free memory that copies of weights may take."""


class JoinedProjections:
    """Copies of the weights of q, k and v, and of gate and up, each set one below the other.

    With few tokens, a product takes the time in which its weight is read, and a launch. Those of
    keys and values are small with grouped queries. Joined, a layer has three launches less per
    step. The weights must not change while the copies are used.

    Linear layers with hooks, biases or adapters are left out, as are all of a model without fused
    modules, and on a CPU. On a GPU without room for both sets, q, k and v come first.

    Args:
        model: A model, patched with fused=True or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._joined: dict[nn.Module, Tensor] = {}
        kinds: list[list[nn.Module]] = [
            [one for one in model.modules() if getattr(type(one), "shares_input", False)],
            [one for one in model.modules() if isinstance(one, GatedMLP)],
        ]
        for modules in kinds:
            layers = {
                module: [linear.weight for linear in projections(module)]
                for module in modules
                if all(map(is_plain_linear, projections(module)))
            }
            if not _have_room([weight for found in layers.values() for weight in found]):
                continue
            with torch.no_grad():
                self._joined |= {module: _join(found) for module, found in layers.items()}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context in which the layers compute with the copies."""
        try:
            for module, joined in self._joined.items():
                vars(module)[JOINED_WEIGHTS] = joined
            yield
        finally:
            for module in self._joined:
                vars(module).pop(JOINED_WEIGHTS, None)


def _join(weights: list[Any]) -> Tensor:
    """Returns weights [N_i, E] as one, [N, E], in the dtype in which products are computed."""
    dtype = _dtype_of_products(weights[0])
    return torch.cat([weight.detach().to(dtype) for weight in weights])


def _dtype_of_products(weight: Tensor) -> torch.dtype:
    return autocast_dtype(weight.device.type) or weight.dtype


def _have_room(weights: list[Any]) -> bool:
    """Returns whether weights are on a GPU, and copies take a small share of its free memory."""
    free = free_bytes(weights[0].device) if weights else None
    needed = sum(weight.numel() * _dtype_of_products(weight).itemsize for weight in weights)
    return free is not None and needed <= SHARE * free
