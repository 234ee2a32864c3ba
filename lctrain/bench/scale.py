"""`lctrain-bench scale`: times training steps and shared documents on every GPU of a launch.

    lctrain-bench scale                                                     # one GPU, to compare
    torchrun --standalone --nproc-per-node 8 -m lctrain.bench scale
    torchrun --standalone --nproc-per-node 2 -m lctrain.bench scale --tiny  # a trial on CPUs

The parts, in their order; the record is written after each of them:

- attention: forward and backward on one shared document, by exchanged heads and by gathered keys;
- linear: training steps of a few layers, on each GPU alone and with FSDP2 on all of them;
- context: training steps of fewer layers on one document, alone and shared by all GPUs;
- spread: how unequal the ranks' times are on log-normal documents, shuffled and balanced;
- attention-long: as attention, on a longer document;
- whole: training steps of the whole model with FSDP2;
- copies: the steps of linear with a copy of the parameters on every GPU (DDP);
- context-long: as context, on the longer document, which no GPU computes alone.

The efficiency of a shared document is (seconds on one GPU / GPUs) / (seconds of the slowest GPU).
Predictions are those of `lctrain-bench cost`, at the speed that one GPU had in the same part, or in
the part context.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lctrain.bench.balance import Mix
from lctrain.bench.cost import MODELS
from lctrain.bench.scale_context import HEAD_DIM, HEADS, KEY_HEADS, time_attention, time_context
from lctrain.bench.scale_spread import time_spread
from lctrain.bench.scale_steps import ALONE, free, time_steps, with_layers
from lctrain.bench.shapes import llama_8b, tiny
from lctrain.config import MemoryConfig
from lctrain.distributed import Topology
from lctrain.run.rank import is_launched, local_rank
from lctrain_kernels.bench.__main__ import names_of, positive, results_folder
from lctrain_kernels.bench.peers import installed_version
from lctrain_kernels.bench.scale_report import scale_table
from lctrain_kernels.strict_json import write_json

PARTS = (
    "attention",
    "linear",
    "context",
    "spread",
    "attention-long",
    "whole",
    "copies",
    "context-long",
)
SPREAD_SHAPE, SPREAD_LAYERS = "llama-1b", 4
MIX = Mix(131_072, 1.5, 20_000)
TINY_MIX = Mix(256, 1.0, 200, mu=4.0)
SIZES, TINY_SIZES = (HEADS, KEY_HEADS, HEAD_DIM), (4, 2, 16)  # of attention without a model


class Parts:
    """The measurements by name, on the ranks of the default process group.

    Args:
        options: Options of the command.
        device: Device of this rank.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options = options
        self.device = device
        self.shape = MODELS[options.shape]
        self.spread_shape = with_layers(MODELS[SPREAD_SHAPE], SPREAD_LAYERS)
        if options.tiny:
            self.shape, self.spread_shape = tiny(self.shape), tiny(self.spread_shape)
        self.lengths = [options.tokens // options.documents] * options.documents
        self.speed: float | None = None
        self.done: list[str] = []
        self.accelerator = "gpu" if device.type == "cuda" else "cpu"

    def run(self, name: str) -> Any:
        """Runs one part, and returns its results. All ranks must call it.

        Args:
            name: A name of PARTS.
        """
        method: Callable[[], Any] = getattr(self, f"_{name.replace('-', '_')}")
        found = method()
        self.done.append(name)
        return found

    def _attention(self) -> Any:
        return self._layer(self.options.context_tokens, self.options.steps)

    def _attention_long(self) -> Any:
        return self._layer(self.options.long_tokens, 1)

    def _layer(self, tokens: int, calls: int) -> dict[str, Any]:
        sizes = TINY_SIZES if self.options.tiny else SIZES
        # The kernels of the longer document are compiled by the part attention.
        warm_up = 0 if tokens == self.options.long_tokens and "attention" in self.done else 1
        rows = time_attention(tokens, calls, self.device, warm_up, sizes)
        return {"tokens": tokens, "rows": rows}

    def _linear(self) -> Any:
        return {"rows": [self._steps(name) for name in (ALONE, "fsdp2")]}

    def _copies(self) -> Any:
        return {"rows": [self._steps("ddp")]}

    def _steps(self, strategy: str) -> dict[str, Any]:
        shape = with_layers(self.shape, self.options.layers)
        found = time_steps(
            strategy, shape, self.lengths, self.options.steps, self.accelerator, warm_up=2
        )
        return {"shape": shape.title, **found}

    def _whole(self) -> Any:
        layers = self.shape.settings["num_hidden_layers"]
        memory = MemoryConfig(name="checkpoint", keep_attention=layers)
        steps = min(self.options.steps, 2)
        found = time_steps(
            "fsdp2", self.shape, self.lengths, steps, self.accelerator, warm_up=1, memory=memory
        )
        return {"rows": [{"shape": self.shape.title, "memory": "checkpoint", **found}]}

    def _context(self) -> Any:
        options = self.options
        found = self._shared(options.context_tokens, min(options.steps, 2), options.context_layers)
        self.speed = found["speed"]
        return found

    def _context_long(self) -> Any:
        if self.speed is None:
            raise ValueError(
                "--parts must hold context for context-long, whose prediction needs the speed of "
                "one GPU. Add it."
            )
        return self._shared(self.options.long_tokens, 1, self.options.long_layers, self.speed)

    def _shared(
        self, tokens: int, steps: int, layers: int, speed: float | None = None
    ) -> dict[str, Any]:
        shape = with_layers(self.shape, layers)
        kept = shape.settings["num_hidden_layers"]
        memory = MemoryConfig(name="checkpoint", keep_attention=kept)
        found = time_context(
            shape, tokens, steps, self.accelerator, warm_up=1, memory=memory, speed=speed
        )
        return {"shape": shape.title, "memory": "checkpoint", **found}

    def _spread(self) -> Any:
        mix = TINY_MIX if self.options.tiny else MIX
        steps = 2 if self.options.tiny else self.options.spread_steps
        found = time_spread(self.spread_shape, mix, steps, self.device)
        return {"shape": self.spread_shape.title, **found}


def measure(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measures one part after the other, and yields the record after each. All ranks iterate.

    A part that fails, such as for lack of memory, is recorded as such. No part begins after
    `options.limit_s`.

    Args:
        options: Options of the command.
        device: Device of this rank.
    """
    ranks, begin = Topology.of_process(), time.monotonic()
    parts = Parts(options, device)
    versions = {name: installed_version(name) for name in ("torch", "triton", "transformers")}
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {"python": platform.python_version(), **versions},
        "settings": {
            "ranks": ranks.size,
            "shape": parts.shape.title,
            "tokens": sum(parts.lengths),
            "documents": options.documents,
        },
        "parts": {},
        "seconds": {},
    }
    for name in options.parts:
        since = time.monotonic()
        if ranks.of_first(since - begin > options.limit_s):
            _say(f"{name}: not begun after {options.limit_s} s")
            continue
        _say(f"{since - begin:6.1f} s  {name} ...")
        try:
            found = parts.run(name)
        except Exception as error:  # the other parts are still worth their time
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        free(device)
        record["parts"][name] = found
        record["seconds"][name] = round(time.monotonic() - since, 1)
        yield record


def _say(text: str) -> None:
    """Prints a line on rank 0, at once."""
    if Topology.of_process().is_first:
        print(text, flush=True)


def save(record: dict[str, Any], output: Path | None) -> Path:
    """Writes the record as JSON and returns the file; None names it by date, ranks and device."""
    device = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    name = f"{record['date'][:10].replace('-', '')}-{record['settings']['ranks']}-{device}"
    output = output or results_folder() / "scale" / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    partial_file = output.with_suffix(".part")
    write_json(partial_file, record, indent=1)
    os.replace(partial_file, output)
    return output


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = names_of(dict.fromkeys(PARTS), "--parts")
    parser.add_argument("--parts", type=parts, default=list(PARTS), help="names, with commas")
    parser.add_argument("--shape", choices=sorted(MODELS), default=llama_8b.name)
    parser.add_argument("--layers", type=positive, default=8, help="of linear and copies")
    parser.add_argument("--context-layers", type=positive, default=2, help="of context")
    parser.add_argument("--long-layers", type=positive, default=1, help="of context-long")
    parser.add_argument("--tokens", type=positive, default=32_768, help="of a pack")
    parser.add_argument("--documents", type=positive, default=4, help="of a pack")
    parser.add_argument("--context-tokens", type=positive, default=131_072, help="shared document")
    parser.add_argument("--long-tokens", type=positive, default=524_288, help="the longer one")
    parser.add_argument("--steps", type=positive, default=4, help="timed ones, at most")
    parser.add_argument("--spread-steps", type=positive, default=6, help="packs of every rank")
    parser.add_argument("--limit-s", type=positive, default=3600, help="no part begins after it")
    parser.add_argument("--tiny", action="store_true", help="a trial on CPUs")
    parser.add_argument("--output", type=Path, help="JSON file; default: results/scale/")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.tokens, options.context_tokens, options.long_tokens = 256, 512, 1024
    if "context-long" in options.parts and "context" not in options.parts:
        parser.error(
            "--parts must hold context for context-long, whose prediction needs the speed of one "
            "GPU. Add it."
        )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Joins the ranks, measures, and writes and prints the record on rank 0."""
    options = parse_arguments(arguments)
    device = torch.device("cpu")
    if torch.cuda.is_available() and not options.tiny:
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    joins = not dist.is_initialized()
    with tempfile.TemporaryDirectory() as folder:
        if joins:
            backend = "nccl" if device.type == "cuda" else "gloo"
            limit = datetime.timedelta(minutes=5)
            alone = {"init_method": f"file://{folder}/store", "rank": 0, "world_size": 1}
            store: dict[str, Any] = {} if is_launched() else alone
            dist.init_process_group(backend, timeout=limit, **store)
        is_first = Topology.of_process().is_first
        for record in measure(options, device):
            if is_first:
                output = save(record, options.output)
                name = list(record["parts"])[-1]
                print(f"{name}: {record['seconds'][name]} s, saved in {output}", flush=True)
        if joins:
            dist.destroy_process_group()  # else the backend's thread runs while Python ends
    if is_first:
        print(scale_table(record), flush=True)
    return int(any("error" in part for part in record["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
