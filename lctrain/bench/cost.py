"""`lctrain-bench cost`: computes how training scales to 1,024 GPUs, from printed assumptions.

    lctrain-bench cost                    # 8 ranks share a pack; more GPUs train on more packs
    lctrain-bench cost --context all      # all ranks share one pack; more GPUs have longer packs

Every number is computed, none is measured. The time of a step is the sum of

- compute: the largest model FLOPs of any rank, at the assumed share of the peak;
- exchange: the bytes that attention layers exchange in forward and backward, on the rank that
  receives most. This time overlaps with nothing;
- FSDP2: parameters are gathered twice (bf16) and gradients summed once (float32). torch overlaps
  both with compute, so only the time by which they exceed compute counts.

Efficiency is the compute time with evenly divided FLOPs, divided by the time of a step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf, isinf
from pathlib import Path
from typing import Any

import torch

from lctrain.bench.shapes import SHAPES, ModelShape, build_shape, llama_8b
from lctrain.distributed.context import ContextShard, choose_heads
from lctrain.distributed.traffic import AttentionWidths, received_backward, received_forward
from lctrain.flops import FlopCounter, peak_flops
from lctrain_kernels.bench.__main__ import positive
from lctrain_kernels.strict_json import write_json

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
MODELS = {**SHAPES, llama_8b.name: llama_8b}
BEYOND = (
    "From {:,} GPUs, the ranks that share a pack are on several machines: heads are exchanged "
    "inside a machine, and keys are gathered between machines."
)
PARAMETER_BYTES, GRADIENT_BYTES, STATE_BYTES = 2, 4, 2  # gathered, summed, exchanged


@dataclass(frozen=True)
class Assumptions:
    """The assumptions of the cost model.

    Attributes:
        model: Title of the model.
        gpu: Name of the GPU, which gives the dense bf16 peak.
        peak_share: Share of the peak that a step reaches on one GPU.
        on_machine: GPUs of a machine.
        link: Bytes per second that a GPU receives from GPUs of its machine.
        network: Bytes per second that a GPU receives from other machines.
        latency: Seconds of a collective, whatever its size.
        tokens: Tokens per rank.
        document: Tokens of a document; a smaller pack is one document.
        context: Ranks that share a pack; None for all of them.
    """

    model: str
    gpu: str
    peak_share: float
    on_machine: int
    link: float
    network: float
    latency: float
    tokens: int
    document: int
    context: int | None

    def __str__(self) -> str:
        context = "all ranks" if self.context is None else f"{self.context} ranks"
        return (
            f"Computed, not measured. Assumed: {self.model} in bf16 on {self.gpu}, "
            f"{self.peak_share:.0%} of its peak; {self.on_machine} GPUs per machine; a GPU "
            f"receives {self.link / 1e9:g} GB/s inside a machine and {self.network / 1e9:g} GB/s "
            f"between machines; {self.latency * 1e6:g} us per collective; {self.tokens:,} tokens "
            f"per rank; documents of {self.document:,} tokens; {context} share a pack; no "
            "recomputation; all ranks equally fast."
        )


@dataclass(frozen=True)
class ModelCost:
    """Size of a model, and the bytes and FLOPs of its layers."""

    parameters: int
    layers: int
    key_heads: int
    widths: AttentionWidths
    flops: FlopCounter

    @classmethod
    def of(cls, shape: ModelShape) -> ModelCost:
        """Returns the cost of a model, which is built on the meta device to be counted."""
        model = build_shape(shape, "sdpa", torch.device("meta"), torch.bfloat16)
        config = model.config
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        return cls(
            sum(parameter.numel() for parameter in model.parameters()),
            config.num_hidden_layers,
            key_heads,
            AttentionWidths.plain(heads, key_heads, config.head_dim),
            FlopCounter.of(model),
        )


def step_cost(
    cost: ModelCost,
    assumed: Assumptions,
    gpus: int,
    *,
    speed: float | None = None,
    exchange: str = "auto",
) -> dict[str, Any]:
    """Returns one row of the table: the computed times of a step.

    Args:
        cost: Size of the model.
        assumed: Assumptions of the cost model.
        gpus: Number of GPUs, each of which is a rank.
        speed: FLOPs per second of a GPU; None takes the assumed share of the GPU's peak.
        exchange: What ranks that share a pack exchange: heads, keys or auto.
    """
    size = gpus if assumed.context is None else assumed.context
    heads = choose_heads(exchange, size, cost.key_heads, min(size, assumed.on_machine))
    pack = assumed.tokens * size
    lengths = [assumed.document] * (pack // assumed.document) or [pack]
    lengths += [left] if (left := pack - sum(lengths)) else []
    shard = ContextShard.of(lengths, size, heads)
    if speed is None:
        peak = peak_flops(assumed.gpu)
        assert peak is not None
        speed = peak * assumed.peak_share
    flops = cost.flops.step_flops(lengths)
    matrices = 6 * cost.flops.matrix_parameters * pack
    pairs = sum(shard.work)
    busiest = max(
        matrices * tokens / pack + (flops - matrices) * work / pairs
        for tokens, work in zip(shard.tokens, shard.work, strict=True)
    )
    compute = busiest / speed
    exchanged = cost.layers * exchange_seconds(cost.widths, shard, assumed)
    sharded = _fsdp_seconds(cost, assumed, gpus)
    seconds = compute + exchanged + max(0.0, sharded - compute)
    return {
        "gpus": gpus,
        "context": size,
        "heads": heads,
        "tokens": assumed.tokens * gpus,
        "compute_seconds": compute,
        "exchange_seconds": exchanged,
        "fsdp_seconds": sharded,
        "step_seconds": seconds,
        "tokens_per_second": assumed.tokens * gpus / seconds,
        "efficiency": flops / size / speed / seconds,
    }


def exchange_seconds(widths: AttentionWidths, shard: ContextShard, assumed: Assumptions) -> float:
    """Returns the seconds that the exchange of one attention layer takes, forward and backward.

    Args:
        widths: Heads and head dims of the layer.
        shard: Assignment of the pack's tokens to the ranks.
        assumed: Assumptions of the cost model.
    """
    if shard.size == 1:
        return 0.0
    crosses = shard.size > assumed.on_machine
    between = assumed.network if crosses else assumed.link
    slowest = 0.0
    for rank in range(shard.size):
        counts = (
            received_forward(shard, rank, widths, STATE_BYTES),
            received_backward(shard, rank, widths, STATE_BYTES),
        )
        inside = sum(count.all_to_all for count in counts)
        keys = sum(count.all_gather + count.reduce_scatter for count in counts)
        slowest = max(slowest, inside / assumed.link + keys / between)
    # Queries, keys, values and the output; keys and values; both again in the backward.
    collectives = 2 * ((4 if shard.heads > 1 else 0) + (2 if shard.groups > 1 else 0))
    return slowest + collectives * assumed.latency


def _fsdp_seconds(cost: ModelCost, assumed: Assumptions, gpus: int) -> float:
    """Returns the seconds of gathering all parameters twice and summing all gradients once."""
    # A ring crosses the border of a machine on the network cards of all its GPUs.
    is_one_machine = gpus <= assumed.on_machine
    ring = min(assumed.link, assumed.network * assumed.on_machine)
    speed = assumed.link if is_one_machine else ring
    count = cost.parameters * (gpus - 1) / gpus * (2 * PARAMETER_BYTES + GRADIENT_BYTES)
    return count / speed + 3 * (cost.layers + 1) * assumed.latency


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a table in Markdown."""
    titles = ["GPUs", "share a pack", "exchange heads", "tokens/step", "compute s", "exchange s"]
    titles += ["FSDP2 s", "step s", "tokens/s", "efficiency"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    form = "| {:,} | {:,} | {} | {:,} | {:.3f} | {:.4f} | {:.3f} | {:.3f} | {:,.0f} | {:.3f} |"
    return "\n".join([*lines, *(form.format(*row.values()) for row in rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the assumptions and the table, and writes both if asked for."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=sorted(MODELS), default=llama_8b.name)
    parser.add_argument("--gpu", default="H200", help="its peak is in lctrain.flops")
    parser.add_argument("--peak-share", type=float, default=0.5, help="of the peak, on one GPU")
    parser.add_argument("--on-machine", type=positive, default=8, help="GPUs of a machine")
    parser.add_argument("--link", type=float, default=350.0, help="GB/s inside a machine, per GPU")
    parser.add_argument("--network", type=float, default=40.0, help="GB/s between them, per GPU")
    parser.add_argument("--latency", type=float, default=20.0, help="us per collective")
    parser.add_argument("--tokens", type=positive, default=16_384, help="per rank")
    parser.add_argument("--document", type=positive, default=131_072, help="tokens of a document")
    parser.add_argument("--context", default="8", help="ranks that share a pack, or all")
    parser.add_argument("--output", type=Path, help="JSON file; default: none")
    options = parser.parse_args(arguments)
    if peak_flops(options.gpu) is None:
        parser.error(
            f"--gpu must be a GPU with a known peak, got {options.gpu}. See lctrain.flops."
        )
    for name, largest in (("peak_share", 1.0), ("link", inf), ("network", inf)):
        value = getattr(options, name)
        if not 0 < value <= largest or isinf(value):
            limit = f"in (0, {largest:g}]" if largest < inf else "above 0, and finite"
            parser.error(
                f"--{name.replace('_', '-')} must be {limit}, got {value}. Leave it out for the "
                f"default, {parser.get_default(name):g}."
            )
    if not 0 <= options.latency < inf:
        parser.error(f"--latency must be at least 0, and finite, got {options.latency}.")
    contexts = [str(count) for count in range(1, GPUS[-1] + 1) if GPUS[-1] % count == 0]
    if options.context not in ("all", *contexts):
        parser.error(
            f"--context must be all or a number of ranks that divides {GPUS[-1]:,} GPUs, got "
            f"{options.context}. Use a power of two."
        )
    assumed = Assumptions(
        MODELS[options.shape].title,
        options.gpu,
        options.peak_share,
        options.on_machine,
        options.link * 1e9,
        options.network * 1e9,
        options.latency / 1e6,
        options.tokens,
        options.document,
        None if options.context == "all" else int(options.context),
    )
    cost = ModelCost.of(MODELS[options.shape])
    counts = [gpus for gpus in GPUS if assumed.context is None or gpus % assumed.context == 0]
    rows = [step_cost(cost, assumed, gpus) for gpus in counts]
    print(f"{assumed}\n\n{table(rows)}")
    if beyond := [row["gpus"] for row in rows if row["context"] > assumed.on_machine]:
        print(f"\n{BEYOND.format(beyond[0])}")
    if options.output:
        record = {"assumptions": asdict(assumed), "rows": rows}
        write_json(options.output, record, indent=1)
        print(f"Wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
