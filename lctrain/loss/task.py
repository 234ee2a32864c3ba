"""Task: the losses of the two kinds of language models that LongContextModule trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lctrain.limits import TASKS, require
from lctrain.loss.causal_lm import causal_lm_loss, token_losses
from lctrain.loss.masked_lm import masked_lm_loss, masked_losses


class Task(NamedTuple):
    """The losses of one kind of language model.

    Attributes:
        pack_loss: Called with (model, PackedBatch); returns the summed loss and the number of
            targets.
        losses: Called with (model, keyword arguments of the model, positions, targets); returns one
            loss per position.
    """

    pack_loss: Callable[..., tuple[Tensor, Tensor]]
    losses: Callable[..., Tensor]


_ALL = {
    "causal": Task(causal_lm_loss, token_losses),
    "mlm": Task(masked_lm_loss, masked_losses),
}


def task_of(name: str) -> Task:
    """Returns the losses of a task.

    Args:
        name: "causal" or "mlm".

    Raises:
        ValueError: if there is no such task.
    """
    require(
        name in _ALL,
        f"task must be one of {', '.join(TASKS)}, got {name!r}. mlm trains an encoder.",
    )
    return _ALL[name]
