"""Memory and operations of mixtures of experts, whose weights transformers keeps in 3-D tensors."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lctrain.experts import token_shares


def group_experts(model: nn.Module) -> None:
    """Makes a model compute its experts as one grouped product, as transformers does by default.

    The loop over the experts in use reads the router's choice, which the meta device has not.

    Args:
        model: A copy of a model, which is changed.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) == "eager":
            config._experts_implementation = "grouped_mm"


def elements(layer: nn.Module, chosen: int = 1, trained: bool = False) -> float:
    """Returns the number of elements of a layer's matrices by which one token is multiplied.

    peft adds the adapters of experts to their weights, so no token is multiplied by the adapters,
    and their gradients need those of the weights.

    Args:
        layer: A layer.
        chosen: Number of experts that compute each token.
        trained: Whether to leave out matrices whose gradients nothing needs.
    """
    shares = token_shares(layer, chosen)
    adapted: set[int] = set()
    adapters: set[int] = set()
    for wrapper in layer.modules():
        module: Any = wrapper
        if hasattr(module, "parameter_name") and hasattr(module, "lora_A"):  # peft's ParamWrapper
            factors = [*module.lora_A.parameters(), *module.lora_B.parameters()]
            adapters.update(map(id, factors))
            if any(factor.requires_grad for factor in factors):
                adapted.add(id(module.get_param()))
    found = 0.0
    for parameter in layer.parameters():
        key = id(parameter)
        if key in adapters or (trained and not parameter.requires_grad and key not in adapted):
            continue
        if parameter.dim() == 2 or key in shares:
            found += parameter.numel() * shares.get(key, 1.0)
    return found


def grouped_product(first: Tensor, second: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Returns an empty tensor like the result of torch's grouped_mm, which is in bfloat16 on meta.

    Args:
        first: [T, K]; [K, T] for gradients of weights; or [G, T, K].
        second: [G, K, N]; [T, N] for gradients of weights, which are [G, K, N]; or [K, N].
        offsets: [G], ends of the rows of each expert; None for two 3-D tensors.
    """
    shape: tuple[int, ...] = (*first.shape[:-1], second.shape[-1])
    if first.dim() == second.dim() == 2:
        shape = (len(cast(Tensor, offsets)), *shape)
    elif first.dim() == 3 and second.dim() == 2:
        shape = shape[1:]
    return torch.empty(shape, dtype=first.dtype, device=first.device)
