"""Saves on some ranks, resumes on others, kills saves, and loads; test_checkpoints.py starts it.

Usage: python -m tests.distributed.checkpoint_ranks FOLDER

All ranks are forked from one process, which imports torch once.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import omegaconf  # noqa: F401 (here, so that the forks need not)
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from lctrain.callbacks import StepCheckpoint
from lctrain.config import OptimConfig
from lctrain.data import PackedDataModule
from lctrain.distributed import Topology, context
from lctrain.distributed.sharding import whole_value
from lctrain.distributed.strategy import ShardedStrategy
from lctrain.module import LongContextModule
from lctrain.run.sharded_checkpoint import AnyCheckpointIO
from tests.distributed import unread_models
from tests.distributed.killed_saves import kill_saves
from tests.distributed.ranks import fork_ranks
from tests.training import VOCABULARY, make_trainer

PACKS = 8  # of an optimizer step
STEPS, SAVED = 4, 2  # a run saves twice
LENGTHS = [4 + 7 * i % 23 for i in range(43)]  # packs of 4 to 32 tokens, an epoch of 3 steps


class Run(NamedTuple):
    """A run of all steps, or one that goes on from the checkpoint of another.

    Attributes:
        ranks: Number of ranks. Each accumulates PACKS / (number of context groups) packs.
        strategy: Strategy: "fsdp2", "ddp", or "auto" for one device.
        resumes: Name of the run to go on from; None for a run from the beginning.
        replicas: Copies of sharded parameters.
        context: Ranks that share a pack.
    """

    ranks: int
    strategy: str = "fsdp2"
    resumes: str | None = None
    replicas: int = 1
    context: int = 1


RUNS = {
    "four": Run(4),
    "four-again": Run(4, resumes="four"),
    "one": Run(1, resumes="four"),
    "plain": Run(1, "auto", resumes="four"),
    "two": Run(2, resumes="four"),
    "ddp": Run(2, "ddp"),
    "ddp-from-shards": Run(2, "ddp", resumes="four"),
    "shards-from-ddp": Run(2, resumes="ddp"),
    "eight": Run(8, resumes="four", replicas=2, context=2),
}


class Recorder(LongContextModule):
    """A module that records the documents and the loss of every optimizer step."""

    def __init__(self, make=None):
        optim = OptimConfig(learning_rate=0.02, schedule="linear")
        super().__init__(lambda _: (make or make_model)(), optim)
        self.documents, self.steps = [], []

    def training_step(self, batch, batch_idx):
        self.documents.append(tuple(batch.document_ids.tolist()))
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if not self.trainer.fit_loop._should_accumulate():
            ranks = Topology.of(self.trainer)
            packs = {pack for of_rank in ranks.gather(self.documents) for pack in of_rank}
            self.steps.append((sorted(packs), float(self.last_loss)))
            self.documents = []


def make_model():
    """Returns a random model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def make_data():
    """Returns packs of unequal size."""
    documents = [[3 + (7 * i + j) % 90 for j in range(n)] for i, n in enumerate(LENGTHS)]
    return PackedDataModule(documents, max_tokens=32, held_out_fraction=0.0)


def fit(folder: Path, name: str, run: Run, make=None, **settings) -> dict:
    """Trains, and returns the steps and the weights after the last one.

    Args:
        folder: Folder of all runs.
        name: Name of the run.
        run: The run.
        make: Function that builds the model; None for `make_model`.
        **settings: Further arguments of the Trainer.
    """
    strategy = run.strategy
    if strategy == "fsdp2":
        strategy = ShardedStrategy(run.replicas, context_parallel=run.context)
    module = Recorder(make)
    is_whole = run.resumes is None
    trainer = make_trainer(
        folder / name,
        [StepCheckpoint(folder / name, every_n_steps=SAVED)] if is_whole else [],
        strategy=strategy,
        devices=run.ranks,
        max_epochs=-1,
        max_steps=STEPS,
        accumulate_grad_batches=PACKS * run.context // run.ranks,
        gradient_clip_val=0.5,
        enable_checkpointing=is_whole,
        plugins=[AnyCheckpointIO()],
        **settings,
    )
    begin = None if is_whole else folder / run.resumes / f"step-{SAVED:08d}.ckpt"
    trainer.fit(module, make_data(), ckpt_path=begin, weights_only=True)
    is_sharded = all(isinstance(p.data, DTensor) for p in module.model.parameters())
    assert is_sharded == (run.strategy == "fsdp2"), "one rank must shard, too"
    weights = {n: whole_value(p.data).clone() for n, p in module.model.named_parameters()}
    return {"steps": module.steps, "weights": weights}


def main(rank: int, size: int, folder: Path) -> None:
    """Trains every run of `size` ranks, and writes the results of rank 0."""
    context.BORDER = 4  # so that the short documents are divided
    runs = folder.parent
    for name, run in RUNS.items():
        if run.ranks == size:
            found = fit(runs, name, run)
            if rank == 0:
                torch.save(found, runs / f"{name}.pt")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for size in dict.fromkeys(run.ranks for run in RUNS.values()):
        folder = root / f"ranks_{size}"
        folder.mkdir()
        fork_ranks(main, size, folder)
    torch.save(kill_saves(root / "killed"), root / "killed.pt")
    folder = root / "pretrained" / "ranks"
    folder.mkdir(parents=True)
    unread_models.save(folder.parent)
    fork_ranks(unread_models.shard_all, unread_models.RANKS, folder)
