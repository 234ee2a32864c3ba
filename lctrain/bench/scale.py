"""`lctrain-bench scale`: times training steps and shared attention on every GPU of a launch.

    lctrain-bench scale                                                     # one GPU, to compare
    torchrun --standalone --nproc-per-node 8 -m lctrain.bench scale
    torchrun --standalone --nproc-per-node 2 -m lctrain.bench scale --tiny  # a trial on CPUs

Every rank trains on packs of equally many tokens: first with a copy of the parameters on every rank
(DDP), then with sharded parameters (FSDP2). Then all ranks compute attention on one shared
document, by exchanging heads and by gathering keys. The efficiency of this attention is (seconds
for the whole document on one rank / ranks) / (seconds for a rank's share).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.batch import PackedBatch
from lctrain.bench.shapes import SHAPES, ModelShape, tiny
from lctrain.callbacks.throughput import peak_memory_gib
from lctrain.config import OptimConfig
from lctrain.distributed import Topology
from lctrain.distributed.attention import flash_attn_shared_func
from lctrain.distributed.context import ContextShard, choose_heads
from lctrain.distributed.shared_pack import ContextGroups, SharedPack
from lctrain.distributed.strategy import ShardedStrategy
from lctrain.module import LongContextModule
from lctrain_kernels.bench.__main__ import positive, results_folder

WARM_UP = 3  # steps or calls before the timed ones
STRATEGIES = ("ddp", "fsdp2")
EXCHANGES = ("heads", "keys")
HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128  # shape of the shared attention


class Times(pl.Callback):
    """Callback that times optimizer steps.

    Attributes:
        seconds: Seconds of every optimizer step.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        """Starts the clock."""
        self._since = now(pl_module.device)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Stops the clock."""
        self.seconds.append(now(pl_module.device) - self._since)


class RandomPacks(torch.utils.data.IterableDataset[PackedBatch]):
    """Endless stream of packs of random tokens, all with the same documents' lengths.

    Args:
        lengths: Number of tokens of every document.
        vocabulary: Number of different tokens.
        seed: Seed of the tokens.
    """

    def __init__(self, lengths: Sequence[int], vocabulary: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.vocabulary = vocabulary
        self.seed = seed

    def __iter__(self) -> Iterator[PackedBatch]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            drawn = torch.randint(self.vocabulary, (sum(self.lengths),), generator=generator)
            yield PackedBatch.from_documents(drawn.split(self.lengths))


def time_steps(
    strategy: str, shape: ModelShape, lengths: Sequence[int], steps: int, accelerator: str
) -> dict[str, Any]:
    """Trains a model on random packs, and returns its speed and peak memory.

    Args:
        strategy: "ddp" or "fsdp2".
        shape: Model to train, with random weights.
        lengths: Number of tokens of every document of a pack. Each rank trains on one pack a step.
        steps: Number of timed steps, after WARM_UP others.
        accelerator: Lightning's name of the accelerator, such as "gpu".

    Returns:
        The strategy; "seconds", the median step of the slowest rank; "tokens_per_second" of all
        ranks; and "peak_memory_gib", the largest of any rank.
    """
    ranks, on_node = _ranks(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    times = Times()
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=on_node,
        num_nodes=max(1, ranks.size // on_node),
        strategy=ShardedStrategy() if strategy == "fsdp2" else strategy,
        precision="32-true" if accelerator == "cpu" else "bf16-mixed",
        max_steps=WARM_UP + steps,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
    )
    module = LongContextModule(
        {"model_type": shape.model_type, **shape.settings}, OptimConfig(warmup_steps=0)
    )
    rows = RandomPacks(lengths, shape.vocab_size, ranks.rank)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=None))
    seconds = statistics.median(times.seconds[WARM_UP:])
    slowest = ranks.maximum(torch.tensor(seconds, device=module.device)).item()
    return {
        "strategy": strategy,
        "seconds": slowest,
        "tokens_per_second": sum(lengths) * ranks.size / slowest,
        "peak_memory_gib": max(ranks.gather(peak_memory_gib(trainer.strategy.root_device))),
    }


def time_exchange(exchange: str, tokens: int, calls: int, device: torch.device) -> dict[str, Any]:
    """Times forward and backward of attention on one document that all ranks share."""
    ranks = _ranks()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def attention(size: int, heads: int, rank: int) -> Callable[..., Tensor]:
        groups = ContextGroups.of(size, heads)
        shared = SharedPack.of(ContextShard.of([tokens], size, heads), rank, device, groups)
        return partial(flash_attn_shared_func, shared=shared, causal=True)

    def drawn(rows: int) -> list[Tensor]:
        heads = (HEADS, KEY_HEADS, KEY_HEADS)
        made = [torch.randn(rows, count, HEAD_DIM, device=device) for count in heads]
        return [tensor.to(dtype).requires_grad_() for tensor in made]

    heads = choose_heads(exchange, ranks.size, KEY_HEADS, ranks.size)
    own = ContextShard.of([tokens], ranks.size, heads).tokens[ranks.rank]
    alone = _seconds(attention(1, 1, 0), drawn(tokens), calls)
    share = _seconds(attention(ranks.size, heads, ranks.rank), drawn(own), calls)
    slowest = ranks.maximum(torch.tensor([alone, share], device=device)).tolist()
    return {
        "exchange": exchange,
        "whole_seconds": slowest[0],
        "share_seconds": slowest[1],
        "efficiency": slowest[0] / ranks.size / slowest[1],
    }


def _seconds(function: Callable[..., Tensor], tensors: Sequence[Tensor], calls: int) -> float:
    """Returns the median seconds of forward and backward."""
    times = []
    for _ in range(WARM_UP + calls):
        since = now(tensors[0].device)
        function(*tensors).sum().backward()
        times.append(now(tensors[0].device) - since)
    return statistics.median(times[WARM_UP:])


def now(device: torch.device) -> float:
    """Returns the seconds of a clock, after the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _ranks() -> Topology:
    return Topology.of_process()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything on the ranks of the default process group, and returns the record."""
    on_gpu = torch.cuda.is_available() and not options.tiny
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    shape = tiny(SHAPES[options.shape]) if options.tiny else SHAPES[options.shape]
    tokens, context = (256, 512) if options.tiny else (options.tokens, options.context_tokens)
    times = partial(
        time_steps,
        shape=shape,
        lengths=[tokens // options.documents] * options.documents,
        steps=options.steps,
        accelerator="gpu" if on_gpu else "cpu",
    )
    size = _ranks().size
    exchanges = [name for name in EXCHANGES if name == "keys" or KEY_HEADS % size == 0]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": {
            "ranks": size,
            "shape": shape.title,
            "tokens": tokens,
            "documents": options.documents,
            "context_tokens": context,
        },
        "steps": [times(strategy) for strategy in STRATEGIES],
        "context": [time_exchange(name, context, options.steps, device) for name in exchanges],
    }


def table(record: dict[str, Any]) -> str:
    """Returns the record as two tables in Markdown."""
    lines = ["| strategy | s/step | tokens/s | GiB |", "|---|---|---|---|"]
    for row in record["steps"]:
        numbers = (row["seconds"], row["tokens_per_second"], row["peak_memory_gib"])
        lines.append("| {} | {:.4f} | {:,.0f} | {:.2f} |".format(row["strategy"], *numbers))
    lines += ["", "| exchange | whole s | share s | efficiency |", "|---|---|---|---|"]
    for row in record["context"]:
        numbers = (row["whole_seconds"], row["share_seconds"], row["efficiency"])
        lines.append("| {} | {:.5f} | {:.5f} | {:.3f} |".format(row["exchange"], *numbers))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Joins the ranks, measures, and writes and prints the record on rank 0."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--tokens", type=positive, default=32_768, help="of a pack")
    parser.add_argument("--documents", type=positive, default=4, help="of a pack")
    parser.add_argument("--context-tokens", type=positive, default=131_072, help="shared document")
    parser.add_argument("--steps", type=positive, default=20, help="timed ones")
    parser.add_argument("--tiny", action="store_true", help="a trial on CPUs")
    parser.add_argument("--output", type=Path, help="JSON file; default: results/scale/")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available() and not options.tiny
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with tempfile.TemporaryDirectory() as folder:
        if not dist.is_initialized():
            backend, alone = "nccl" if on_gpu else "gloo", "RANK" not in os.environ
            store: dict[str, Any] = {
                "init_method": f"file://{folder}/store",
                "rank": 0,
                "world_size": 1,
            }
            dist.init_process_group(backend, **(store if alone else {}))
        record = measure(options)
    ranks = _ranks()
    if ranks.is_first:
        name = f"{ranks.size}-{record['device'].lower().replace(' ', '-')}.json"
        output = options.output or results_folder() / "scale" / name
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n")
        print(table(record))
        print(f"Wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
