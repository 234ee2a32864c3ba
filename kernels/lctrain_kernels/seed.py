"""The seed of a call's dropout masks."""

import torch
from torch import Tensor


def resolve_seed(
    dropout_p: float, dropout_seed: int | Tensor | None, device: torch.device
) -> Tensor | None:
    """Returns the seed as one int64 element [1] on `device`; None without dropout.

    Args:
        dropout_p: Probability of dropping a weight.
        dropout_seed: An int, one int64 element on `device`, or None to draw it from torch's
            generator of that device.
        device: Of the tensors of the call.

    Raises:
        ValueError: if the seed is a tensor on another device.
    """
    if dropout_p == 0:
        return None
    if dropout_seed is None:
        # Drawn here, so that activation checkpointing, which restores the generator, replays it.
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(dropout_seed, Tensor):
        if dropout_seed.device != device:
            raise ValueError(
                f"dropout_seed must be on q's device ({device}), got {dropout_seed.device}. "
                "Move it with .to(), or pass an int."
            )
        return dropout_seed.reshape(1)
    return torch.full((1,), dropout_seed, dtype=torch.int64, device=device)
