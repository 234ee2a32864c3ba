"""Runs tests.train_two_ranks with a user's module and callbacks; test_token_exact.py starts it.

Usage: python -m tests.callbacks.train_two_ranks OUT_FILE
"""

import os
import sys
from pathlib import Path

import torch

from lctrain.callbacks import PatchAttention, TokenExactLoss
from lctrain.process_group import leave_at_exit
from tests.callbacks.own_module import OwnModule
from tests.float64 import built_in_float64
from tests.train_two_ranks import CLIP, WINDOW, batches, make_model
from tests.training import loader, make_trainer


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


def main(out: Path) -> None:
    """Trains, and writes the results of rank 0 to OUT_FILE."""
    exact = TokenExactLoss()
    module = Recorder(exact)
    trainer = make_trainer(
        out.parent,
        [exact, PatchAttention()],
        strategy="ddp",
        devices=2,
        accumulate_grad_batches=WINDOW,
        gradient_clip_val=CLIP,
    )
    trainer.fit(module)
    if trainer.is_global_zero:
        torch.save({"records": module.records, "weights": module.model.state_dict()}, out)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    leave_at_exit()
    with built_in_float64():
        main(Path(sys.argv[1]))
