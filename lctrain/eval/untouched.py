"""untouched: runs an evaluation that leaves a model and all random numbers as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from lctrain.loss import evaluation_mode
from lctrain.models.kept_frequencies import kept_frequencies


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Context manager: the model is in eval mode, and nothing has changed afterwards.

    At its end, even after an error, every module has its own training flag back, rotary embeddings
    have their frequencies, and the random generators of Python, NumPy and torch, on the CPU and on
    the model's GPU, have their states.

    Args:
        model: The model.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device.index or 0 for device in devices]):
        try:
            with evaluation_mode(model), kept_frequencies(model):
                yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
