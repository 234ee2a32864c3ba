"""The ranks of lctrain-eval: their order while they read data, and their devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lctrain.distributed import Topology
from lctrain.run.rank import local_rank


@contextmanager
def first_rank_first(ranks: Topology) -> Iterator[None]:
    """Context manager whose body the other ranks run after the first one, as to read its cache.

    All ranks raise if one does. The body must not communicate.

    Raises:
        ValueError: on ranks that did not fail, with the message of the first one that did.
    """
    if not ranks.is_first:
        with ranks.failing_together():
            pass  # the body of the first rank
    with ranks.failing_together():
        yield
    if ranks.is_first:
        with ranks.failing_together():
            pass  # the body of the others


def device_of(device: torch.device, ranks: Topology) -> torch.device:
    """Returns the device of this rank: of several ranks, each has a GPU of its own.

    Args:
        device: The device that was asked for.
        ranks: Ranks of the evaluation.

    Raises:
        ValueError: if several ranks would share a GPU.
    """
    if ranks.size == 1 or device.type != "cuda":
        return device
    found, number = torch.cuda.device_count(), local_rank()
    if device.index is not None or number >= found:
        raise ValueError(
            f"device must be cuda or auto, with a GPU for each rank, got {device} and {found} GPUs "
            f"for rank {number} of this machine. Start as many ranks as there are GPUs."
        )
    return torch.device("cuda", number)
