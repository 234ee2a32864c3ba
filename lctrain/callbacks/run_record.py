"""RunRecord: writes the run's id and options into checkpoints, loggers and the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from lctrain.distributed import Topology
from lctrain.run.folder import RunFolder
from lctrain.run.resume import IDENTITY_KEY


class RunRecord(pl.Callback):
    """Writes a run's id and identity into checkpoints, and its options into folder and loggers.

    Args:
        folder: Folder of the run.
        identity: Identity of the run: the options that a resumed run must not change.
        options: All options of the run, resolved, as nested plain values. Loggers get them as
            hyperparameters.
    """

    def __init__(
        self, folder: RunFolder, identity: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        self.folder = folder
        self.identity = dict(identity)
        self.options = dict(options)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the run's options into its folder and passes them to the loggers.

        By then, data and checkpoint have been checked.
        """
        if Topology.of(trainer).is_first:
            self.folder.save_options(self.options)
        for logger in trainer.loggers:
            logger.log_hyperparams(self.options)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stores the run's id and identity in the checkpoint."""
        checkpoint[IDENTITY_KEY] = {"id": self.folder.id, "identity": self.identity}
