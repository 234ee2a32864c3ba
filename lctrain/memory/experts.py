"""Memory and operations of mixtures of experts, whose weights transformers keeps in 3-D tensors."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


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


def experts_per_token(config: Any) -> int:
    """Returns the number of experts that compute each token; 1 for a model without experts.

    Args:
        config: Configuration of a transformers model.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "num_experts_per_tok", None) or 1


def elements(layer: nn.Module, chosen: int = 1, trained: bool = False) -> float:
    """Returns the number of elements of a layer's matrices by which one token is multiplied.

    Args:
        layer: A layer.
        chosen: Number of experts that compute each token.
        trained: Whether to leave out frozen matrices.
    """
    found = 0.0
    for parameter in layer.parameters():
        if trained and not parameter.requires_grad:
            continue
        if parameter.dim() == 2:
            found += parameter.numel()
        elif parameter.dim() == 3:
            found += parameter.numel() * min(1, chosen / len(parameter))
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
