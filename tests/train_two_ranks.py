"""Trains in float64 on two gloo ranks with packs of unequal size; tests/test_module.py starts it.

Usage: python -m tests.train_two_ranks FOLDER

The last packs hold prompts that completions share, one of them on both ranks. The results of rank 0
are FOLDER/found.pt.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule
from transformers import LlamaConfig, LlamaForCausalLM

from lctrain.batch import PackedBatch
from lctrain.config import OptimConfig
from lctrain.module import LongContextModule
from tests.distributed.ranks import fork_ranks
from tests.float64 import built_in_float64
from tests.training import loader, make_batch, make_trainer

LENGTHS = [[[5, 9], [2, 3, 4], [31]], [[40], [17, 30], [6]]]  # by rank and micro-batch
RANKS = 2
WINDOW = 2  # micro-batches: the last window of the epoch is incomplete
CLIP = 0.5
PROMPT, OTHER = list(range(20, 45)), [7, 8, 9]
GROUPS = [  # by rank
    [(PROMPT, [[50, 51, 52]])],
    [(OTHER, [[60], [61, 62]]), (PROMPT, [[53], [54, 55, 56, 57, 58]])],
]


def batches(rank: int):
    """Returns the packs of one rank."""
    return [make_batch(lengths, 10 * rank + i) for i, lengths in enumerate(LENGTHS[rank])]


def whole_groups() -> PackedBatch:
    """Returns the groups of both ranks in one pack."""
    ((_, first),), (other, (prompt, second)) = GROUPS
    return PackedBatch.from_groups([other, (prompt, [*first, *second])])


def make_model(layers: int = 2) -> LlamaForCausalLM:
    """Returns the same random model on every rank."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


class Recorder(LongContextModule):
    """A module with plain SGD that records losses and gradient norms."""

    def __init__(self, model):
        super().__init__(model, OptimConfig())
        self.records = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if not self.trainer.fit_loop._should_accumulate():
            self.records.append((float(self.last_loss), float(self.gradient_norm)))

    def train_dataloader(self):
        return loader(batches(self.global_rank))


class GroupsRecorder(Recorder):
    """A Recorder whose last packs hold groups."""

    def train_dataloader(self):
        rank = self.global_rank
        return loader([*batches(rank)[:-1], PackedBatch.from_groups(GROUPS[rank])])


def trained(module: LightningModule, folder: Path, callbacks: Sequence[Callback] = ()) -> dict:
    """Trains a module on all ranks, and returns its records and weights.

    Args:
        module: A module with `records` and `model`.
        folder: Folder of the trainer.
        callbacks: Callbacks of the trainer.
    """
    trainer = make_trainer(
        folder,
        callbacks,
        strategy="ddp",
        devices=RANKS,
        accumulate_grad_batches=WINDOW,
        gradient_clip_val=CLIP,
    )
    trainer.fit(module)
    return {"records": module.records, "weights": module.model.state_dict()}


def main(rank: int, size: int, folder: Path) -> None:
    """Trains, and writes the results of rank 0."""
    with built_in_float64():
        found = trained(GroupsRecorder(make_model()), folder)
    if rank == 0:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    fork_ranks(main, RANKS, Path(sys.argv[1]))
