"""evaluation_mode: runs a model in eval mode and restores its training mode afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager: puts a model into eval mode, without gradients.

    At its end, every module gets its own training flag back; flags may differ between modules.

    Args:
        model: The model.
    """
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag
        # Autocast caches bfloat16 copies of weights. A copy made under no_grad has no gradient.
        torch.clear_autocast_cache()
