"""Patching: the base class of the callbacks PatchAttention and AttentionSchedule."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from lctrain.callbacks.override import Override
from lctrain.distributed import Topology
from lctrain.models.patch import PatchHandle
from lctrain.models.within import ModelPatches, Paths, find_models
from lctrain.module import LongContextModule

log = logging.getLogger(__name__)

LOGGED_AS = "attention_patch"  # name of the hyperparameter in the loggers


class Patching(pl.Callback):
    """Patches the transformers models of a LightningModule for the duration of one run.

    Models that exist before the run are patched before data are prepared. Models that
    `configure_model` builds are patched right after it. Every model is restored when the run ends,
    even if it ends by an error. Subclasses define how one model is patched, in `_patch_one`.

    Attributes:
        models: Attribute paths of the models to patch, such as "policy.model"; None for all models.
        patches: Handles of the models that are patched now, by attribute path.
    """

    def __init__(self, models: Paths = None) -> None:
        self.models = models
        self.patches = ModelPatches({})
        self._configure_model: Override | None = None
        self._told = False
        self._log: Any = None

    def _patch_one(self, model: Any) -> PatchHandle:
        """Patches one model and returns its handle; subclasses define it."""
        raise NotImplementedError

    @property
    def log(self) -> Any:
        """The `log` method of the module, which Lightning sets on every callback."""
        return self._log

    @log.setter
    def log(self, function: Any) -> None:
        # Lightning sets `log` before it prepares data. No hook gets the module that early.
        self._log = function
        module = getattr(function, "__self__", None)
        if isinstance(module, pl.LightningModule):
            self.release()
            self._told = False
            self._patch_what_is_there(module)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes `configure_model` patch the models that it builds.

        Raises:
            ValueError: if there is no transformers model, or one cannot be patched.
        """
        self._patch_what_is_there(pl_module)
        if self._configure_model is not None:
            self._configure_model.restore()

        def make(configure_model: Any) -> Any:
            def build() -> None:
                with _without_own_patch(pl_module):
                    configure_model()
                self._patch_new(pl_module)

            return build

        self._configure_model = Override(pl_module, "configure_model", make)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs which modules of the models were replaced; the models are on their device now."""
        self._tell(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs which modules of the models were replaced, unless it is logged already."""
        self._tell(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs which modules of the models were replaced, unless it is logged already."""
        self._tell(trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs which modules of the models were replaced, unless it is logged already."""
        self._tell(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restores the models."""
        self.release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Restores the models after an error."""
        self.release()

    def release(self) -> None:
        """Restores the models and the module's `configure_model`. Does nothing if called again."""
        self.patches.unpatch()
        self.patches = ModelPatches({})
        if self._configure_model is not None:
            self._configure_model.restore()
            self._configure_model = None

    def _patch_what_is_there(self, module: pl.LightningModule) -> None:
        """Patches the models that exist now.

        Does nothing if no model exists and the module may build its models later.
        """
        refuse_wrapped(module)
        if _builds_later(module):
            try:
                if not find_models(module, self.models):
                    return
            except ValueError:  # a path that is not there yet
                return
        self._patch_new(module)

    def _patch_new(self, module: pl.LightningModule) -> None:
        """Patches the models that are not patched yet. On an error, restores every model."""
        found = find_models(module, self.models)
        if not found:
            raise ValueError(
                f"{type(self).__name__} needs a transformers model, got none in "
                f"{type(module).__name__}. Assign the model to an attribute of the module, or name "
                f"the place of a hidden one: {type(self).__name__}(models='attribute.path')."
            )
        known = {id(handle.model) for handle in self.patches.handles.values()}
        new = {path: model for path, model in found.items() if id(model) not in known}
        self._refuse_twins(module, new)
        for path, model in new.items():
            try:
                self.patches.handles[path] = self._patch_one(model)
            except ValueError as error:
                self.release()
                if len(found) == 1:
                    raise
                others = ", ".join(repr(other) for other in found if other != path)
                name = type(self).__name__
                raise ValueError(
                    f"{name} must fit all models of {type(module).__name__}, got {path!r}, which "
                    f"it does not: {error} Name the models that it is for (models={others}), and "
                    f"give {path!r} a {name} of its own."
                ) from error

    def _refuse_twins(self, module: pl.LightningModule, new: dict[str, Any]) -> None:
        trainer = module._trainer
        for other in [] if trainer is None else trainer.callbacks:
            if other is self or not isinstance(other, Patching):
                continue
            theirs = {id(handle.model) for handle in other.patches.handles.values()}
            for path, model in new.items():
                if id(model) in theirs:
                    raise ValueError(
                        f"callbacks must patch a model once, got {type(other).__name__} and "
                        f"{type(self).__name__} for {path!r}. Remove one of them, or name "
                        "different models (models=...)."
                    )

    def _tell(self, trainer: pl.Trainer) -> None:
        """Logs which modules were replaced, also to the loggers, once per run."""
        if self._told or not self.patches.handles:
            return
        self._told = True
        with trainer.precision_plugin.forward_context():
            text = repr(self.patches)
        if Topology.of(trainer).is_first:
            say(f"{type(self).__name__} swapped:\n{text}")
            for logger in trainer.loggers:
                logger.log_hyperparams({LOGGED_AS: text})


def say(message: str) -> None:
    """Logs a message at level INFO, with lctrain's logger or, if that is off, with Lightning's."""
    if log.isEnabledFor(logging.INFO):
        log.info(message)
    else:
        rank_zero_info(message)


def refuse_wrapped(module: nn.Module) -> None:
    """Raises a ValueError if a part of the module is already wrapped in DDP or FSDP.

    Patches must be applied before wrapping; the trainer's strategy wraps the module later.
    """
    for path, part in module.named_modules():
        if isinstance(part, (DistributedDataParallel, FullyShardedDataParallel)):
            raise ValueError(
                f"the models of {type(module).__name__} must not be wrapped, got a "
                f"{type(part).__name__} at {path!r}. Keep the model itself in the module: the "
                "trainer's strategy wraps it."
            )


def _builds_later(module: pl.LightningModule) -> bool:
    """Returns whether the module may build models in its `setup` or `configure_model`."""
    return any(is_overridden(name, module) for name in ("setup", "configure_model"))


@contextmanager
def _without_own_patch(module: pl.LightningModule) -> Iterator[None]:
    """Context manager in which a LongContextModule does not patch its own model."""
    if not isinstance(module, LongContextModule):
        yield
        return
    attention, module.attention = module.attention, None
    try:
        yield
    finally:
        module.attention = attention
