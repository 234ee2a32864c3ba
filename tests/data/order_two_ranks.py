"""Trains on two ranks with a RowOrder: once whole, and once stopped and resumed.

test_dataset.py starts it. Usage: python -m tests.data.order_two_ranks FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from lctrain.callbacks import ResumeOrder, StepCheckpoint
from lctrain.data import RowOrder, pack
from lctrain.process_group import leave_at_exit
from tests.callbacks.own_module import OwnModule
from tests.train_two_ranks import make_model
from tests.training import make_trainer

STEPS, STOP = 9, 4  # an epoch has 5 steps
LENGTHS = [5, 16, 9, 12, 3, 14, 8, 11, 16, 6, 13, 7, 10, 15, 4, 9]
DOCUMENTS = [[3 + (7 * i + j) % 90 for j in range(length)] for i, length in enumerate(LENGTHS)]


class Seen(OwnModule):
    """A module that records the tokens of every batch."""

    def __init__(self):
        super().__init__(make_model())
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch.input_ids[0].tolist())
        return super().training_step(batch, batch_idx)


def make_rows():
    """Returns packs with unequal attention work."""
    return pack(DOCUMENTS, max_tokens=16)


def run(folder: Path, steps: int, checkpoint: Path | None = None) -> Seen:
    """Trains up to a step, resuming from a checkpoint if one is given."""
    rows = make_rows()
    loader = DataLoader(rows, batch_size=None, sampler=RowOrder(rows, 5))
    trainer = make_trainer(
        folder,
        [ResumeOrder(), StepCheckpoint(folder, every_n_steps=1)],
        strategy="ddp",
        devices=2,
        max_epochs=-1,
        max_steps=steps,
        enable_checkpointing=True,
        use_distributed_sampler=True,
    )
    module = Seen()
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return module


def main(folder: Path) -> None:
    """Trains, and writes the tokens that each rank saw into FOLDER."""
    whole = run(folder / "whole", STEPS)
    begun = run(folder / "part", STOP)
    rest = run(folder / "part", STEPS, folder / "part" / "last.ckpt")
    seen = {"whole": whole, "begun": begun, "rest": rest}
    record = {name: {"batches": one.batches, "losses": one.seen} for name, one in seen.items()}
    torch.save(record, folder / f"{whole.global_rank}.pt")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    leave_at_exit()
    main(Path(sys.argv[1]))
