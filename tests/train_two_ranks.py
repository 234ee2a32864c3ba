"""Trains in float64 on two gloo ranks with packs of unequal size; tests/test_module.py starts it.

Usage: python -m tests.train_two_ranks OUT_FILE
"""

import os
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lctrain.config import OptimConfig
from lctrain.module import LongContextModule
from lctrain.process_group import leave_at_exit
from tests.float64 import built_in_float64
from tests.training import loader, make_batch, make_trainer

LENGTHS = [[[5, 9], [2, 3, 4], [31]], [[40], [17, 30], [6]]]  # by rank and micro-batch
WINDOW = 2  # micro-batches: the last window of the epoch is incomplete
CLIP = 0.5


def batches(rank: int):
    """Returns the packs of one rank."""
    return [make_batch(lengths, 10 * rank + i) for i, lengths in enumerate(LENGTHS[rank])]


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


def main(out: Path) -> None:
    """Trains, and writes the results of rank 0 to OUT_FILE."""
    module = Recorder(make_model())
    trainer = make_trainer(
        out.parent,
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
