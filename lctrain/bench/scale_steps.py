"""time_steps: times training steps on random packs, on one GPU or on all GPUs of a launch."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lctrain.batch import PackedBatch
from lctrain.bench.shapes import ModelShape
from lctrain.callbacks.throughput import peak_memory_gib
from lctrain.config import MemoryConfig, OptimConfig
from lctrain.distributed import Topology
from lctrain.distributed.strategy import ShardedStrategy
from lctrain.module import LongContextModule
from lctrain.run.rank import ranks_on_machine

ALONE = "alone"  # every rank trains a model of its own, as one GPU does
WARM_UP = 3  # steps or calls before the timed ones


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


def with_layers(shape: ModelShape, layers: int | None) -> ModelShape:
    """Returns a shape with fewer layers; None keeps all.

    Args:
        shape: Shape of a model.
        layers: Number of layers.
    """
    if layers is None or layers >= shape.settings["num_hidden_layers"]:
        return shape
    title = f"{shape.title}, {layers} layers"
    return replace(shape, title=title, settings={**shape.settings, "num_hidden_layers": layers})


def build_on(shape: ModelShape, device: torch.device) -> nn.Module:
    """Returns a model in float32 with random weights, which are drawn on `device`.

    Under `parameters_on_meta` the weights are on the meta device.

    Args:
        shape: Shape of the model.
        device: Device of this rank; drawing 8B weights on a CPU takes minutes.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        config = CONFIG_MAPPING[shape.model_type](**shape.settings)
        made: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return made


def time_steps(
    strategy: str,
    shape: ModelShape,
    lengths: Sequence[int],
    steps: int,
    accelerator: str,
    *,
    warm_up: int = WARM_UP,
    memory: MemoryConfig | None = None,
    context: int = 1,
    exchange: str = "auto",
) -> dict[str, Any]:
    """Trains a model on random packs, and returns its speed and peak memory. All ranks call it.

    Args:
        strategy: "ddp", "fsdp2", "auto" for the only rank, or "alone": all ranks train at the same
            time, and each has its own model.
        shape: Model to train, with random weights.
        lengths: Number of tokens of every document of a pack.
        steps: Number of timed steps.
        accelerator: Lightning's name of the accelerator, such as "gpu".
        warm_up: Number of steps before the timed ones.
        memory: What the layers keep for the backward; None for everything.
        context: Number of ranks that share a pack (fsdp2).
        exchange: What these ranks exchange: heads, keys or auto.

    Returns:
        The strategy; "gpus", the number of GPUs that train one model; "rank_seconds", the median
        step of every rank; "seconds", that of the slowest rank; "tokens_per_second" of all these
        GPUs, "tokens_per_second_per_gpu"; and "peak_memory_gib", the largest of any rank.
    """
    ranks, on_node = Topology.of_process(), ranks_on_machine()
    alone = strategy == ALONE
    device = _device(accelerator)
    chosen: Any = strategy
    if alone:
        chosen = SingleDeviceStrategy(device=device)
    elif strategy == "fsdp2":
        chosen = ShardedStrategy(context_parallel=context, context_exchange=exchange)
    times = Times()
    devices: Any = on_node
    if alone:
        devices = [device.index] if device.type == "cuda" else 1
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=1 if alone else max(1, ranks.size // on_node),
        strategy=chosen,
        precision="32-true" if accelerator == "cpu" else "bf16-mixed",
        max_steps=warm_up + steps,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
    )
    # At its end Lightning would copy weights and optimizer states to the host.
    trainer.strategy.teardown = lambda: None  # type: ignore[method-assign]
    module = LongContextModule(
        lambda datamodule: build_on(shape, device), OptimConfig(warmup_steps=0), memory=memory
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rows = RandomPacks(lengths, shape.vocab_size, ranks.rank // context)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=None))
    peak = peak_memory_gib(device)
    del module, trainer, chosen
    free(device)
    seconds = ranks.gather(statistics.median(times.seconds[warm_up:]))
    gpus = 1 if alone else ranks.size
    speed = sum(lengths) * (gpus // context) / max(seconds)
    return {
        "strategy": strategy,
        "gpus": gpus,
        "seconds": max(seconds),
        "rank_seconds": seconds,
        "tokens_per_second": speed,
        "tokens_per_second_per_gpu": speed / gpus,
        "peak_memory_gib": max(ranks.gather(peak)),
    }


def _device(accelerator: str) -> torch.device:
    if accelerator == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def free(device: torch.device) -> None:
    """Frees memory that nothing refers to any more, so that the next measurement gets it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def now(device: torch.device) -> float:
    """Returns the seconds of a clock, after the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
