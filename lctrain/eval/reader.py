"""Reader: a model as a task sees it, with the settings of its forward passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lctrain.distributed import ONE_RANK, Topology


def _ignore(units: int) -> None:
    """Counts nothing."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A model that reads documents, with the settings of its forward passes.

    Attributes:
        model: A causal LM, patched for the method of reading.
        device: Device of the model.
        max_tokens: Largest number of tokens in a forward pass.
        segment: Length in tokens of the parts into which documents are cut; None for whole ones.
        advance: Function that moves the progress bar by a number of units.
        ranks: Ranks that share the documents; each has the model, or all share its parameters.
        cache_gib: Most memory of a paged cache in GiB; None for a share of the free memory.
    """

    model: Any
    device: torch.device
    max_tokens: int
    segment: int | None = None
    advance: Callable[[int], None] = _ignore
    ranks: Topology = ONE_RANK
    cache_gib: float | None = None
