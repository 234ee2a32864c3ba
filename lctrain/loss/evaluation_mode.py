"""evaluation_mode: runs a model in eval mode and restores its training mode afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode and turns gradients off, inside the context.

    At the end of the context, the training flag of every module is restored. The flags of different
    modules may differ.

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
        # Autocast caches cast weights. Those that it cast under no_grad have no gradient.
        torch.clear_autocast_cache()
