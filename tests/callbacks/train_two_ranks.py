"""Trains LongContextModule and a user's module on two ranks; test_token_exact.py starts it.

Usage: python -m tests.callbacks.train_two_ranks FOLDER

The results of rank 0 are FOLDER/module.pt and FOLDER/callback.pt.
"""

import sys
from pathlib import Path

import torch

from lctrain.callbacks import PatchAttention, TokenExactLoss
from tests.callbacks.own_module import OwnModule
from tests.distributed.ranks import fork_ranks
from tests.float64 import built_in_float64
from tests.train_two_ranks import RANKS, batches, make_model, trained
from tests.train_two_ranks import Recorder as ModuleRecorder
from tests.training import loader


class Recorder(OwnModule):
    """A module that records the losses per token; its data are the packs of this rank."""

    def __init__(self, exact):
        super().__init__(make_model(), learning_rate=0.5)
        self.exact, self.records = exact, []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert self.implementations[-1] == "lctrain_flash"
        if not self.trainer.fit_loop._should_accumulate():
            self.records.append((float(self.exact.last_loss),))

    def train_dataloader(self):
        return loader(batches(self.global_rank))


def main(rank: int, size: int, folder: Path) -> None:
    """Trains both modules, and writes the results of rank 0."""
    with built_in_float64():
        exact = TokenExactLoss()
        found = {
            "module": trained(ModuleRecorder(make_model()), folder),
            "callback": trained(Recorder(exact), folder, [exact, PatchAttention()]),
        }
    if rank == 0:
        for name, results in found.items():
            torch.save(results, folder / f"{name}.pt")


if __name__ == "__main__":
    fork_ranks(main, RANKS, Path(sys.argv[1]))
