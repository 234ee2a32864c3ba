"""Trains on packs that ranks share; tests/distributed/test_shared_packs.py starts it.

Usage: python -m tests.distributed.shared_packs FOLDER
"""

import copy
import os
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, LlamaConfig, LlamaForCausalLM

from lctrain.callbacks import (
    IsolationCheck,
    IsolationError,
    NonFiniteLossError,
    NonFiniteLossGuard,
)
from lctrain.config import OptimConfig
from lctrain.distributed import Topology, context, shared_pack
from lctrain.distributed.sharding import shard_model, whole_value
from lctrain.distributed.strategy import ShardedStrategy
from lctrain.loss import causal_lm_loss
from lctrain.models.differential import to_differential
from lctrain.module import LongContextModule
from tests.distributed.ranks import fork_ranks
from tests.float64 import built_in_float64
from tests.training import VOCABULARY, loader, make_batch, make_trainer

BORDER = 16  # tokens between borders of chunks, so that short documents are divided
# By data rank and micro-batch. Packs of one document below 2 * BORDER leave ranks without tokens.
LENGTHS = (
    ((130, 5, 33), (20,), (64,), (5, 4), (7,)),
    ((70, 1, 66), (3, 100), (12, 9), (2,), (33,)),
)
ACCUMULATED = 2  # micro-batches: the last window of the epoch is incomplete
CLIP = 0.5
RANKS = 4
PACK = shared_pack._pack


class Case(NamedTuple):
    """A way to train on four ranks.

    Attributes:
        context: Ranks that share a pack.
        exchange: What they exchange.
        attention: Options of the attention.
        replicas: Copies of the parameters.
        memory: Policy of memory.
        version: Version of a differential model; None for a Llama.
        machines: Number of machines that the ranks take themselves to be on.
    """

    context: int
    exchange: str
    attention: dict
    replicas: int = 1
    memory: str | None = None
    version: int | None = None
    machines: int = 1


WINDOW = {"name": "flash", "sliding_window": 40}
DUAL_CHUNK = {"name": "dual_chunk", "chunk_size": 24, "local_size": 8, "scale": "yarn"}
CASES = {
    "heads": Case(2, "auto", {"name": "flash", "fused": False}),
    "keys": Case(2, "keys", WINDOW, replicas=2),
    "dropout-heads": Case(4, "heads", {"name": "flash", "dropout": 0.1}, memory="checkpoint"),
    # Four heads could be exchanged by all ranks; two of them are on each machine.
    "dropout-machines": Case(4, "auto", {"name": "flash", "dropout": 0.1}, machines=2),
    "dual_chunk-heads": Case(4, "heads", DUAL_CHUNK | {"window": 24, "dropout": 0.1}),
    "dual_chunk-keys": Case(2, "keys", DUAL_CHUNK | {"window": 24}),
    # The two pairs of key/value heads make two heads groups, which gather keys from each other.
    "differential-both": Case(4, "auto", {"name": "differential", "dropout": 0.1}, version=1),
    "differential-keys": Case(4, "keys", {"name": "differential", "dropout": 0.1}, version=2),
}


def packs(data_rank: int):
    """Returns the packs of one data rank."""
    return [make_batch(n, 10 * data_rank + i) for i, n in enumerate(LENGTHS[data_rank])]


def make_model(version: int | None = None):
    """Returns the same random model on every rank; a version makes it differential."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCABULARY}
    if version == 1:
        return DiffLlamaForCausalLM(DiffLlamaConfig(**sizes, **heads))
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    return model if version is None else to_differential(model)


class Recorder(LongContextModule):
    """A module with plain SGD that records losses and gradient norms."""

    def __init__(self, model, case, batches):
        memory = None if case.memory is None else {"name": case.memory}
        super().__init__(model, OptimConfig(), attention=case.attention, memory=memory)
        self.batches = batches
        self.records = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if not self.trainer.fit_loop._should_accumulate():
            self.records.append((float(self.last_loss), float(self.gradient_norm)))

    def train_dataloader(self):
        return loader(self.batches(Topology.of(self.trainer).data_rank))


def fit(folder, module, callbacks=(), **settings):
    """Trains one epoch, and returns the records and the weights."""
    trainer = make_trainer(folder, callbacks, gradient_clip_val=CLIP, **settings)
    trainer.fit(module)
    assert vars(module.model)["_lctrain_output_head"].head is not None, "the loss is not fused"
    return module.records, whole_weights(module)


def whole_weights(module):
    """Returns copies of the whole weights of a module's model, by name."""
    weights = {name: whole_value(p.data) for name, p in module.model.named_parameters()}
    return copy.deepcopy(weights)


def fit_second(folder, size):
    """Returns the records and weights of the second module that one trainer trains."""
    case = CASES["heads"]
    strategy = ShardedStrategy(context_parallel=case.context, context_exchange=case.exchange)
    settings = {"devices": size, "accumulate_grad_batches": ACCUMULATED, "gradient_clip_val": CLIP}
    trainer = make_trainer(folder, strategy=strategy, **settings)
    for module in [Recorder(make_model(), case, packs) for _ in range(2)]:
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit(module)
    return module.records, whole_weights(module)


def leaky_pack(lengths_q, lengths_k, device, *_):
    """Returns a shared pack without the boundaries between its documents."""
    return PACK([sum(lengths_q)], [sum(lengths_k)], device, None)


def diverging(data_rank):
    """Returns packs of which the second one is another one on every rank."""
    first, second, *_ = packs(data_rank)
    lengths = second.lengths
    return [first, make_batch(lengths, 100 + torch.distributed.get_rank())]


class OneInfinite(Recorder):
    """A module whose loss is infinite on the last rank, in the second step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        is_last = torch.distributed.get_rank() == RANKS - 1
        return loss * torch.inf if is_last and batch_idx == 1 else loss


def skipped_steps(folder, size):
    """Returns how many steps each rank leaves out if one rank's loss is not finite."""
    guard = NonFiniteLossGuard(on_batch="skip")
    strategy = ShardedStrategy(context_parallel=2)
    fit(
        folder,
        OneInfinite(make_model(), CASES["heads"], packs),
        [guard],
        strategy=strategy,
        devices=size,
    )
    return Topology(torch.distributed.get_rank(), size).gather(guard.left_out)


class Gathers(TorchDispatchMode):
    """Context manager that counts all-gathers of tensors.

    Attributes:
        count: Number of all-gathers.
    """

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "allgather" in str(func)
        return func(*args, **(kwargs or {}))


def gathers_of_a_forward(size):
    """Returns how often a sharded model gathers parameters in a loss, by the tokens of the pack."""
    model = make_model()
    mesh = init_device_mesh("cpu", (size,))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    root = shard_model(model, mesh, torch.device("cpu"), policy)
    found = {}
    with torch.no_grad():
        for tokens in (8, 8, 3000):  # the first pass verifies the head
            pack = make_batch((tokens,))
            with Gathers() as gathers:
                root(partial(causal_lm_loss, model, pack))
            root.reshard()
            found[tokens] = gathers.count
    return found


def errors(folder, size):
    """Returns the messages of runs that must fail, by name."""
    found = {}
    for name, batches, callbacks in (
        ("leak", packs, [IsolationCheck()]),
        ("diverging", diverging, []),
        ("infinite", packs, [NonFiniteLossGuard()]),
    ):
        shared_pack._pack = leaky_pack if name == "leak" else PACK
        strategy = ShardedStrategy(context_parallel=2, context_exchange="heads")
        kind = OneInfinite if name == "infinite" else Recorder
        module = kind(make_model(), CASES["heads"], batches)
        try:
            fit(folder, module, callbacks, strategy=strategy, devices=size)
        except (IsolationError, NonFiniteLossError, ValueError) as error:
            found[name] = str(error)
    return found


def pretend_machines(rank, on_machine):
    """Sets what a launcher sets for a rank, of which `on_machine` are on a machine."""
    machine, local = divmod(rank, on_machine)
    os.environ |= {"NODE_RANK": str(machine), "LOCAL_RANK": str(local)}
    os.environ["LOCAL_WORLD_SIZE"] = str(on_machine)


def main(rank, size, folder) -> None:
    """Trains every case, and writes the results of rank 0."""
    found = {}
    context.BORDER = BORDER
    for name, case in CASES.items():
        with built_in_float64(float32_frequencies=case.attention["name"] == "dual_chunk"):
            strategy = ShardedStrategy(
                case.replicas, context_parallel=case.context, context_exchange=case.exchange
            )
            module = Recorder(make_model(case.version), case, packs)
            settings = {"devices": size // case.machines, "num_nodes": case.machines}
            settings["accumulate_grad_batches"] = ACCUMULATED
            pretend_machines(rank, size // case.machines)
            callbacks = [IsolationCheck()] if name in ("heads", "keys") else []
            found[name] = fit(folder, module, callbacks, strategy=strategy, **settings)
            found["heads", name] = strategy.topology.heads
    pretend_machines(rank, size)
    with built_in_float64():
        found["second"] = fit_second(folder, size)
        found["errors"] = errors(folder, size)
    found["skipped"] = skipped_steps(folder, size)
    found["gathers"] = gathers_of_a_forward(size)
    if rank == 0:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    fork_ranks(main, RANKS, Path(sys.argv[1]))
