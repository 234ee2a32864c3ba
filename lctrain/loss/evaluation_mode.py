"""Run a model as in evaluation and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context without dropout and gradients.

    Every module gets its own training flag back, also where only a part of the model was training.
    """
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag
        # Autocast would go on using the casts of weights that it made without a gradient.
        torch.clear_autocast_cache()
