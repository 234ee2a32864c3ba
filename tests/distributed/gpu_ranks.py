"""Runs what several GPUs must compute like one; tests/distributed/test_two_gpus.py starts it.

Usage: python -m tests.distributed.gpu_ranks RANK SIZE FOLDER PART...

A part of PARTS is a list of results. Rank 0 writes each into FOLDER when it is known. Every rank
prints what it begins, and every minute where it is. Without a GPU, ranks use gloo and the CPU,
which shows that the script runs.
"""

import faulthandler
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import LlamaConfig, LlamaForCausalLM

from lctrain.config import PretrainedModelConfig
from lctrain.distributed import Topology
from lctrain.distributed.context import ContextShard
from lctrain.distributed.hugging_face import save_weights
from lctrain.distributed.sharding import built_to_be_sharded, shard_model, whole_value
from lctrain.distributed.shared_pack import ContextGroups
from lctrain.distributed.strategy import ShardedStrategy
from lctrain.models.differential import to_differential
from lctrain.models.pretrained import load_pretrained
from tests.distributed import checkpoint_ranks, shared_packs
from tests.distributed.checkpoint_ranks import Run
from tests.distributed.context_cases import Result, Settings, share, whole
from tests.distributed.ranks import join
from tests.training import VOCABULARY, make_batch, make_trainer

HAS_GPU = torch.cuda.is_available()
DEVICE, ACCELERATOR = ("cuda", "gpu") if HAS_GPU else ("cpu", "cpu")
RANKS = 2
ATTENTION = Settings((8, 4), 64, torch.bfloat16, device=DEVICE)
ATTENTIONS = ("plain", "options", "dual_chunk", "differential_1", "differential_2")
LENGTHS = (700, 1, 0, 300, 129)
# By data rank and micro-batch, in tokens.
PACKS = (
    ((700, 130), (513,), (64, 65, 300), (256,), (9, 2)),
    ((1000, 1), (384, 384), (33,), (128, 127), (640,)),
)
ACCUMULATED, CLIP = 2, 0.5
POLICY = MixedPrecisionPolicy(cast_forward_inputs=False)


class Training(NamedTuple):
    """A way to train on two ranks: a strategy, the attention and the precision."""

    strategy: str = "fsdp2"
    replicas: int = 1
    context: int = 1
    exchange: str = "auto"
    attention: dict[str, Any] = {"name": "flash"}  # noqa: RUF012 (never changed)
    precision: str = "bf16-mixed"
    version: int | None = None
    memory: str | None = None


EXACT, DUAL_CHUNK = "32-true", {"name": "dual_chunk", "chunk_size": 256, "local_size": 64}
TRAININGS = {
    "ddp": Training("ddp"),
    "shards": Training(memory="checkpoint"),
    "replicas": Training(replicas=2),
    "ddp-float32": Training("ddp", precision=EXACT),
    "shards-float32": Training(precision=EXACT),
    "heads": Training(context=2, exchange="heads"),
    "keys": Training(context=2, exchange="keys"),
    "dual_chunk": Training(context=2, exchange="keys", attention=DUAL_CHUNK),
    "differential": Training(context=2, attention={"name": "differential"}, version=2),
}
CHECKPOINTS = {"two": Run(2), "two-again": Run(2, resumes="two"), "one": Run(1, resumes="two")}
# Parts run at the same time, and compile different kernels as far as possible.
PARTS = {
    "attention": ("attention/plain", "attention/options", "export"),
    "dual_chunk": ("attention/dual_chunk", "training/dual_chunk"),
    "differential_1": ("attention/differential_1",),
    "differential_2": ("attention/differential_2", "training/differential"),
    "copies": ("training/ddp", "training/shards", "training/replicas"),
    "float32": ("training/ddp-float32", "training/shards-float32"),
    "context": ("training/heads", "training/keys"),
    "checkpoints": ("checkpoint/two", "checkpoint/two-again", "checkpoint/one"),
}
TRACE_S = 60  # seconds between two prints of every thread's stack
BEGIN = time.monotonic()


def make_model(version: int | None = None) -> Any:
    """Returns the same random model on every rank; a version makes it differential."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCABULARY}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    return model if version is None else to_differential(model)


def packs(data_ranks: range) -> list[Any]:
    """Returns the packs of some data ranks, those of a step together."""
    by_rank = [[make_batch(n, 10 * r + i) for i, n in enumerate(PACKS[r])] for r in data_ranks]
    begins = range(0, len(by_rank[0]), ACCUMULATED)
    windows = [[x for own in by_rank for x in own[i : i + ACCUMULATED]] for i in begins]
    return [pack for window in windows for pack in window]


def attention(name: str) -> Any:
    """Returns the results of all ranks by the size of heads groups; on one rank its result."""
    size, rank = dist.get_world_size(), dist.get_rank()
    if size == 1:
        return on_cpu(whole(name, LENGTHS, ATTENTION))
    found: dict[int, tuple[ContextShard, list[Result]]] = {}
    for heads in (1, size):
        groups, shard = ContextGroups.of(size, heads), ContextShard.of(LENGTHS, size, heads)
        results: list[Any] = [None] * size
        dist.all_gather_object(results, on_cpu(share(name, shard, rank, groups, ATTENTION)))
        found[heads] = (shard, results)
    return found


def on_cpu(result: Result) -> Result:
    """Returns a result on the CPU."""
    return Result([x.cpu() for x in result.rows], [x.cpu() for x in result.trained])


def fit(folder: Path, case: Training) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Trains one epoch, and returns losses and norms of its steps, and the weights."""
    size = dist.get_world_size()
    data_ranks = RANKS // case.context
    strategy: Any = case.strategy
    if strategy == "fsdp2":
        strategy = ShardedStrategy(
            case.replicas, context_parallel=case.context, context_exchange=case.exchange
        )
    whole_packs = packs(range(data_ranks))
    module = shared_packs.Recorder(
        make_model(case.version),
        case,
        lambda rank: packs(range(rank, rank + 1)) if size == RANKS else whole_packs,
    )
    trainer = make_trainer(
        folder,
        strategy=strategy if size == RANKS else "auto",
        accelerator=ACCELERATOR,
        devices=size,
        precision=case.precision,
        accumulate_grad_batches=ACCUMULATED * (1 if size == RANKS else data_ranks),
        gradient_clip_val=CLIP,
    )
    trainer.fit(module)
    return module.records, {n: w.cpu() for n, w in shared_packs.whole_weights(module).items()}


def export_and_load(folder: Path, rank: int, size: int) -> dict[str, dict[str, Any]]:
    """Writes sharded weights as safetensors, and shards them again from the files."""
    mesh = init_device_mesh(DEVICE, (size,))
    found, model = {}, make_model().to(torch.bfloat16)
    for name in ("before", "after"):
        if name == "after":
            with built_to_be_sharded(rank == 0):
                model = load_pretrained(PretrainedModelConfig(name_or_path=str(folder)), "bfloat16")
            assert all(parameter.is_meta for parameter in model.parameters())
        shard_model(model, mesh, torch.device(DEVICE, rank if HAS_GPU else 0), POLICY)
        values = {n: whole_value(p.data).cpu() for n, p in model.named_parameters()}
        found[name] = values
        if name == "before":
            save_weights(model, folder, Topology(rank, size, 1, is_sharded=True))
            if rank == 0:
                model.config.save_pretrained(folder)
            dist.barrier()
    return found


def compute(item: str, folder: Path, rank: int, size: int) -> Any:
    """Returns a result of a part.

    Args:
        item: Name of the result, such as "training/ddp".
        folder: Folder of the ranks' files; its parent is that of all numbers of ranks.
        rank: Number of this rank.
        size: Number of ranks.
    """
    kind, _, name = item.partition("/")
    if kind == "attention":
        return attention(name)
    if kind == "export":
        return export_and_load(folder.parent / "model", rank, size)
    if kind == "training":
        return fit(folder, TRAININGS[name])
    run, settings = CHECKPOINTS[name], {"accelerator": ACCELERATOR, "precision": "bf16-mixed"}
    if run.resumes is not None:
        saved = path_of(f"checkpoint/{run.resumes}", folder.parent / f"ranks_{RANKS}")
        while not saved.exists():  # another number of ranks computes it at the same time
            time.sleep(0.1)
    return checkpoint_ranks.fit(folder.parent, name, run, make_model, **settings)


def items_of(part: str, size: int) -> list[str]:
    """Returns the results of a part that a number of ranks computes."""
    runs = {f"checkpoint/{name}": run.ranks for name, run in CHECKPOINTS.items()}
    runs["export"] = RANKS
    return [item for item in PARTS[part] if runs.get(item, size) == size]


def path_of(item: str, folder: Path) -> Path:
    """Returns the file of a result."""
    return folder / f"{item.replace('/', '-')}.pt"


def say(text: str) -> None:
    """Prints a text with the seconds since this process began."""
    print(f"{time.monotonic() - BEGIN:6.1f} s  {text}", flush=True)


def main() -> None:
    """Computes some parts on this number of ranks, and writes the results of rank 0."""
    faulthandler.dump_traceback_later(TRACE_S, repeat=True)
    say("imports are done")
    if HAS_GPU:
        torch.cuda.set_device(int(sys.argv[1]))
    rank, size, folder, parts = join("nccl" if HAS_GPU else "gloo")
    for item in [item for part in parts for item in items_of(part, size)]:
        say(f"{item} ...")
        found = compute(item, folder, rank, size)
        if rank == 0:
            path = path_of(item, folder)
            torch.save(found, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
        say(f"{item}: done")
    dist.barrier()
    dist.destroy_process_group()
    say("finished")


if __name__ == "__main__":
    main()
