"""Finds the model of a LightningModule that a callback inspects."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn

from lctrain.models.within import find_models


def find_target(pl_module: pl.LightningModule, path: str | None, callback: Any) -> Any:
    """Returns the one model that a callback is about.

    Without a path that is the only transformers model of the module, or the only one with
    trainable weights; in a module without any, its attribute `model`.

    Args:
        pl_module: The module in training.
        path: Attribute path of the model, or None.
        callback: Name of the callback, for messages.

    Raises:
        ValueError: if there is no such model, or more than one.
    """
    name = type(callback).__name__
    found = find_models(pl_module, path)
    if len(found) > 1:
        trained = {
            place: model
            for place, model in found.items()
            if any(weight.requires_grad for weight in model.parameters())
        }
        found = trained if len(trained) == 1 else found
    if len(found) > 1:
        paths = ", ".join(map(repr, found))
        raise ValueError(
            f"{name} looks at one model, got {len(found)} in {type(pl_module).__name__}: {paths}. "
            f"Name it: {name}(model={next(iter(found))!r})."
        )
    if found:
        return next(iter(found.values()))
    model = getattr(pl_module, "model", None)
    if isinstance(model, nn.Module):
        return model
    raise ValueError(
        f"{name} needs a transformers model, got none in {type(pl_module).__name__}. Assign the "
        "model to an attribute of the module, or name the place of a hidden one: "
        f"{name}(model='attribute.path')."
    )


def refuse_twin(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Raises ValueError if the trainer has a second callback of the same class."""
    kind = type(callback)
    count = sum(type(other) is kind for other in trainer.callbacks)
    if count > 1:
        raise ValueError(
            f"callbacks must hold one {kind.__name__}, got {count}. Remove the others."
        )


def loss_of(outputs: Any) -> Any:
    """Returns the loss tensor from the `outputs` of on_train_batch_end; None if there is none."""
    loss: Any = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return loss.detach() if hasattr(loss, "detach") else None
