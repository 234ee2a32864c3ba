"""`lctrain-bench groups`: times prompts that completions share, beside separate documents.

    lctrain-bench groups --shape llama-1b --sizes 16,64 --prompt 16384 --completion 512
    lctrain-bench groups --shape llama-8b --sizes 2 --prompt 8192 --completion 1024
    lctrain-bench groups --tiny --sizes 4 --prompt 96 --completion 16

The record holds the model FLOPs of both ways (`lctrain.flops`), from which the table says how far
the time exceeds that of the remaining work at the rates of separate documents.

A group is a prompt with its completions. A step is forward and backward of the loss of all
completions of one group. "Shared" is one pack in which the prompt is computed once. "Separate" has
one pack for each completion, with its own copy of the prompt, and computes the packs one after the
other. The weights are random; llama-8b trains LoRA adapters.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lctrain.batch import PackedBatch
from lctrain.bench.shapes import SHAPES, ModelShape, build_shape, llama_8b, tiny
from lctrain.bench.step_process import time_step
from lctrain.config import AdapterConfig, MemoryConfig
from lctrain.flops import FlopCounter
from lctrain.loss import causal_lm_loss
from lctrain.memory.policy import apply_config
from lctrain.models import patch_model
from lctrain.models.low_rank import add_adapter, leave_casts_to_autocast
from lctrain_kernels.bench.__main__ import positive
from lctrain_kernels.bench.peers import installed_version
from lctrain_kernels.bench.run import new_record
from lctrain_kernels.strict_json import write_json

_SHAPES = {**SHAPES, llama_8b.name: llama_8b}
_RANK = 16  # of the adapters of llama-8b


def make_packs(
    size: int, prompt: int, completion: int, vocabulary: int
) -> tuple[PackedBatch, list[PackedBatch]]:
    """Returns one group of random tokens as a pack with a shared prompt, and as separate packs.

    Args:
        size: Number of completions.
        prompt: Tokens of the prompt.
        completion: Tokens of each completion.
        vocabulary: Number of tokens in the vocabulary.
    """
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (prompt,), generator=draw)
    completions = [torch.randint(vocabulary, (completion,), generator=draw) for _ in range(size)]
    shared = PackedBatch.from_groups([(tokens, completions)])
    ignored = torch.full_like(tokens, -100)
    separate = [
        PackedBatch.from_documents([torch.cat([tokens, end])], labels=[torch.cat([ignored, end])])
        for end in completions
    ]
    return shared, separate


def work(model: Any, packs: Sequence[PackedBatch]) -> float:
    """Returns the model FLOPs of forward and backward over packs.

    Args:
        model: A transformers model.
        packs: Packs of one step.
    """
    counter = FlopCounter.of(model)
    parents = [() if pack.groups is None else pack.groups.parents for pack in packs]
    return sum(
        counter.step_flops(pack.lengths, of) for pack, of in zip(packs, parents, strict=True)
    )


def measure(
    model: Any,
    packs: Sequence[PackedBatch],
    device: torch.device,
    mixed: bool,
    warmup: int,
    steps: int,
) -> dict[str, Any]:
    """Times forward and backward of all packs; returns milliseconds, loss and peak memory.

    Args:
        model: The model, on the device.
        packs: Packs of one step.
        device: The device.
        mixed: Whether to compute in bfloat16 autocast.
        warmup: Number of passes over the first pack before the timed steps; all packs are alike.
        steps: Number of timed steps.
    """
    losses: list[torch.Tensor] = []
    batches = [pack.to(device) for pack in packs]

    def step(count: int = len(packs)) -> None:
        model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for batch in batches[:count]:
            with torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext():
                loss, _ = causal_lm_loss(model, batch)
            loss.backward()
            total += loss.detach()
        losses.append(total)

    for _ in range(warmup):
        step(1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timed = [time_step(step, device)[0] for _ in range(steps)]
    found: dict[str, Any] = {
        "step_ms": [round(value, 1) for value in timed],
        "loss": float(losses[-1]),
    }
    if device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return found


def build(shape: ModelShape, device: torch.device, checkpointing: bool) -> tuple[Any, bool]:
    """Returns the patched model, and whether it computes in bfloat16 autocast.

    Args:
        shape: Shape of the model.
        device: The device.
        checkpointing: Whether layers are computed again in the backward.
    """
    on_gpu = device.type == "cuda"
    model = build_shape(shape, "sdpa", device, torch.bfloat16 if on_gpu else torch.float32)
    patch_model(model, fused=True)
    if _has_adapters(shape):
        model = add_adapter(model, AdapterConfig(rank=_RANK)).train()
        if on_gpu:
            leave_casts_to_autocast(model)
    if checkpointing:
        apply_config(model, MemoryConfig(name="checkpoint"), None, "true")
    return model, on_gpu and _has_adapters(shape)


def _has_adapters(shape: ModelShape) -> bool:
    return shape.name == llama_8b.name


def _sizes(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench groups",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=list(_SHAPES), default="llama-1b")
    parser.add_argument("--sizes", type=_sizes, default=[16, 64], help="completions of a group")
    parser.add_argument("--prompt", type=positive, default=16_384, help="tokens of the prompt")
    parser.add_argument("--completion", type=positive, default=512, help="tokens of a completion")
    parser.add_argument("--steps", type=positive, default=3, help="timed steps; default 3")
    parser.add_argument("--warmup", type=positive, default=1, help="packs before; default 1")
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers, in both")
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU trains in seconds")
    parser.add_argument("--output", type=Path, default=Path("groups.json"), help="JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Returns 2 if the machine cannot run it."""
    options = parse_arguments(arguments)
    on_gpu = torch.cuda.is_available()
    if not (options.tiny or on_gpu):
        print(
            "lctrain-bench groups needs a GPU, and torch sees none. Try it with --tiny.",
            file=sys.stderr,
        )
        return 2
    shape = tiny(_SHAPES[options.shape]) if options.tiny else _SHAPES[options.shape]
    device = torch.device("cuda" if on_gpu else "cpu")
    model, mixed = build(shape, device, options.checkpointing)
    header = new_record([], device, 1, 0)
    record: dict[str, Any] = {
        "device": header.device,
        "date": header.date,
        "versions": {**header.versions, "transformers": installed_version("transformers")},
        "shape": shape.title,
        "prompt": options.prompt,
        "completion": options.completion,
        "trained": f"LoRA of rank {_RANK}" if _has_adapters(shape) else "all weights",
        "checkpointing": options.checkpointing,
        "runs": [],
    }
    for size in options.sizes:
        packs = make_packs(size, options.prompt, options.completion, shape.vocab_size)
        run: dict[str, Any] = {"completions": size}
        for name, batches in (("shared", [packs[0]]), ("separate", packs[1])):
            run[name] = measure(model, batches, device, mixed, options.warmup, options.steps)
            run[name]["tokens"] = sum(batch.num_tokens for batch in batches)
            run[name]["flops"] = work(model, batches)
        shared, separate = (median(run[name]["step_ms"]) for name in ("shared", "separate"))
        run["speedup"] = round(separate / shared, 3)
        record["runs"].append(run)
        print(
            f"{size:>4} completions  shared {shared:10.1f} ms, separate {separate:10.1f} ms, "
            f"{run['speedup']:.2f} times the groups per second; losses "
            f"{run['shared']['loss']:.3f} and {run['separate']['loss']:.3f}",
            flush=True,
        )
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, record, indent=1)
    print(f"Wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
