"""evaluation_mode: runs a model in eval mode and restores its training mode afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context in which a model runs in eval mode and without gradients.

    At the end, the training flag of every module is restored, even if the flags differ.

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
