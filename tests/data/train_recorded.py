"""Trains a toy model and records the documents of every step; run as a script or imported by tests.

The script can kill itself with SIGKILL at a batch. killed_ranks.py does the same on two ranks.
"""

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lctrain.data import PackedDataModule, TextSource
from lctrain.process_group import leave_at_exit


class Recorder(LightningModule):
    """A model with one weight; each step appends "rank epoch documents loss-bits" to a file."""

    def __init__(self, record: Path, reads_estimate: bool = True, dies_at: int | None = None):
        super().__init__()
        self.record = record
        self.reads_estimate = reads_estimate
        self.dies_at = dies_at
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = (self.weight * batch.input_ids.float().mean() / 300 - 0.1).square()
        documents = ",".join(map(str, batch.document_ids.tolist()))
        with self.record.open("a") as file:
            file.write(f"{self.global_rank} {self.current_epoch} {documents} {loss.item().hex()}\n")
        if self.dies_at is not None and self.trainer.fit_loop.total_batch_idx == self.dies_at:
            self.die()
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Does nothing, but makes Lightning run the validation."""

    def die(self) -> None:
        """Kills this process when all ranks have come here, none of which then waits for it."""
        if self.trainer.world_size > 1:
            torch.distributed.barrier()
        os.kill(os.getpid(), signal.SIGKILL)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if not self.reads_estimate:
            return optimizer
        steps = self.trainer.estimated_stepping_batches  # makes the loader, before it is restored
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, int(steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def recorded(folder: Path) -> dict[str, list[str]]:
    """Returns the lines that each rank recorded."""
    return {path.name: path.read_text().splitlines() for path in sorted(folder.glob("rank*.txt"))}


def finished_batches(checkpoint: Path) -> int:
    """Returns the number of batches that training has finished, by a checkpoint."""
    return torch.load(checkpoint, weights_only=False)["PackedDataModule"]["batches"]


def make_trainer(checkpoints: Path, **settings: Any) -> Trainer:
    """Returns a silent CPU trainer that keeps its last checkpoint."""
    every = settings.pop("checkpoint_every", 4)
    saving = {"every_n_epochs": 1} if every == "epoch" else {"every_n_train_steps": every}
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    callback = ModelCheckpoint(checkpoints, save_last=True, save_top_k=1, **saving)
    return Trainer(**(defaults | settings), callbacks=[callback])


def main(argv: Sequence[str] | None = None) -> None:
    """Trains two epochs, with the options of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--dies-at", type=int)
    parser.add_argument("--resume", action="store_true")
    train(parser.parse_args(argv))


def train(options: argparse.Namespace, rank: int = 0, devices: int = 1) -> None:
    """Trains two epochs.

    Args:
        options: Options of the command line.
        rank: Number of this rank.
        devices: Number of ranks.
    """
    data = PackedDataModule(
        TextSource(files=f"{options.corpus}/*.txt"),
        max_tokens=256,
        vocab_size=300,
        num_workers=options.workers,
        cache_dir=options.folder.parent / "cache",
    )
    trainer = make_trainer(
        options.folder / "checkpoints",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=2,
        max_epochs=2,
    )
    model = Recorder(options.folder / f"rank{rank}.txt", dies_at=options.dies_at)
    last = options.folder / "checkpoints" / "last.ckpt"
    trainer.fit(model, data, ckpt_path=last if options.resume else None)


if __name__ == "__main__":
    leave_at_exit()
    main()
