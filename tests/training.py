"""Tiny packs, loaders and trainers for the tests that train with Lightning."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Sequence

import lightning.pytorch as pl
import torch

from lctrain.batch import PackedBatch
from lctrain.run import signals

VOCABULARY = 97


def make_batch(lengths: Sequence[int], seed: int = 0) -> PackedBatch:
    """Returns a pack of random documents."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
    names = [f"document-{seed}-{i}" for i in range(len(lengths))]
    return PackedBatch.from_documents(documents, names=names)


class Packs(torch.utils.data.Dataset):
    """A dataset made from a list of packs."""

    def __init__(self, batches: Sequence[PackedBatch]) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> PackedBatch:
        return self.batches[index]


def loader(batches: Sequence[PackedBatch]) -> torch.utils.data.DataLoader:
    """Returns a loader that yields the packs in order."""
    return torch.utils.data.DataLoader(Packs(batches), batch_size=None)


def make_trainer(tmp_path, callbacks=(), **settings) -> pl.Trainer:
    """Returns a CPU trainer that prints nothing."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "inference_mode": False,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | settings))


class KillAt(pl.Callback):
    """Sends a signal to its own process after an optimizer step; by default SIGKILL."""

    def __init__(self, step: int, number: int = signal.SIGKILL) -> None:
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class SignalAt(pl.Callback):
    """Has the first rank send a signal after an optimizer step, and waits until it has arrived.

    Args:
        step: Optimizer steps taken.
        number: The signal.
        to: "group" for every process of the terminal, as Ctrl-C does; "launcher" for the process
            that started the ranks: the first rank itself, or torchrun.
    """

    def __init__(self, step: int, number: int, to: str) -> None:
        self.step, self.number, self.to = step, number, to

    def on_train_start(self, trainer, pl_module) -> None:
        """On a busy machine torchrun may send the signal once more only much later."""
        signals.ONE_SIGNAL_S = math.inf

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step != self.step or not trainer.is_global_zero:
            return
        if self.to == "group":
            os.killpg(0, self.number)
        else:
            os.kill(
                os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid(), self.number
            )
        stop = next(c for c in trainer.callbacks if hasattr(c, "signals"))
        while stop.signals.received is None:
            time.sleep(0.01)
