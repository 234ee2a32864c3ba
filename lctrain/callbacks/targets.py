"""find_target: finds the model in a LightningModule that a callback inspects."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn

from lctrain.models.within import find_models


def find_target(pl_module: pl.LightningModule, path: str | None, callback: Any) -> Any:
    """Returns the model of a LightningModule that a callback inspects.

    If `path` is None, the model is the only transformers model of the module, or the only one with
    trainable weights. In a module without transformers models, it is the attribute `model`.

    Args:
        pl_module: The module in training.
        path: Attribute path of the model; None finds it.
        callback: The callback, whose class is named in messages.

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
    """Raises a ValueError if the trainer has a second callback of the same class.

    Args:
        trainer: The trainer.
        callback: The callback that calls this function.
    """
    kind = type(callback)
    count = sum(type(other) is kind for other in trainer.callbacks)
    if count > 1:
        raise ValueError(
            f"callbacks must hold one {kind.__name__}, got {count}. Remove the others."
        )


def loss_of(outputs: Any) -> Any:
    """Returns the detached loss from `outputs` of on_train_batch_end; None if there is none."""
    loss: Any = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return loss.detach() if hasattr(loss, "detach") else None
