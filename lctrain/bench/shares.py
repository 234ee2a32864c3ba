"""`lctrain-bench shares`: estimates on one GPU how well several GPUs would share a document.

    lctrain-bench shares           # one GPU
    lctrain-bench shares --tiny    # a trial on a CPU

- Attention, forward and backward: the share of one document that each rank would compute is timed,
  one rank after the other, with exchanged heads and with gathered keys. There is no communication.
  The efficiency is (seconds of the whole document / ranks) / (seconds of the slowest share). It is
  below 1 because shares are uneven, and because kernels are less efficient on short calls.
- Training steps with FSDP2 on one rank, compared with the same steps without FSDP2.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.bench.scale_context import HEAD_DIM, HEADS, KEY_HEADS, exchanges
from lctrain.bench.scale_steps import WARM_UP, now, time_steps
from lctrain.bench.shapes import SHAPES, tiny
from lctrain.distributed.context import ContextShard, choose_heads
from lctrain.distributed.shared_pack import ContextGroups, SharedPack
from lctrain_kernels.backend import select_backend
from lctrain_kernels.bench.__main__ import positive, results_folder
from lctrain_kernels.bench.shares_report import share_rows, step_rows
from lctrain_kernels.bench.workloads import WORKLOADS
from lctrain_kernels.strict_json import write_json
from lctrain_kernels.varlen.api import flash_attn_pack_func

STRATEGIES = ("auto", "fsdp2")
NO_GROUPS = ContextGroups(*("no communication",) * 3)


def share_call(
    tokens: int, size: int, heads: int, rank: int, dropout_p: float, device: torch.device
) -> Callable[[], None]:
    """Returns a function that runs forward and backward of a rank's share of one document.

    Args:
        tokens: Number of tokens of the document.
        size: Number of ranks.
        heads: Number of ranks in a heads group; see ContextShard.
        rank: The rank.
        dropout_p: Probability of dropping an attention weight.
        device: Device of the tensors, which are bfloat16 on a GPU and float32 on a CPU.
    """
    shared = SharedPack.of(ContextShard.of([tokens], size, heads), rank, device, NO_GROUPS)
    pack = shared.pack
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    seed = torch.tensor([1], device=device) if dropout_p else None

    def drawn(rows: int, count: int) -> Tensor:
        return torch.randn(rows, count // heads, HEAD_DIM, device=device, dtype=dtype)

    q = drawn(pack.total_q, HEADS).requires_grad_()
    k, v = (drawn(pack.total_k, KEY_HEADS).requires_grad_() for _ in range(2))
    dout = drawn(pack.total_q, HEADS)

    def run() -> None:
        out, _ = flash_attn_pack_func(
            q,
            k,
            v,
            pack,
            causal=True,
            dropout_p=dropout_p,
            dropout_seed=seed,
            first_head=shared.first_head(HEADS),
        )
        torch.autograd.grad(out, (q, k, v), dout)

    return run


def time_shares(
    tokens: int, size: int, rounds: int, dropout_p: float, device: torch.device
) -> list[dict[str, Any]]:
    """Times a whole document and every rank's share of it; returns a row per way to exchange.

    Every round runs the whole document and then all shares once, so that a change of the GPU's
    clock affects all of them. A time is the median over rounds.
    """
    names = exchanges(size, KEY_HEADS)
    layouts = {("whole", 0): (1, 1)}
    for name in names:
        heads = choose_heads(name, size, KEY_HEADS, size)
        layouts |= {(name, rank): (size, heads) for rank in range(size)}
    calls = {
        key: share_call(tokens, *layout, key[1], dropout_p, device)
        for key, layout in layouts.items()
    }
    times: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for _ in range(WARM_UP + rounds):
        for key, call in calls.items():
            since = now(device)
            call()
            times[key].append(now(device) - since)
    medians = {key: statistics.median(found[WARM_UP:]) for key, found in times.items()}
    whole = medians["whole", 0]
    rows = []
    for name in names:
        shares = [medians[name, rank] for rank in range(size)]
        efficiency = whole / size / max(shares)
        rows.append(
            {
                "exchange": name,
                "whole_seconds": whole,
                "share_seconds": shares,
                "efficiency": efficiency,
            }
        )
    return rows


def time_strategies(shape: str, is_tiny: bool, steps: int, turns: int) -> list[dict[str, Any]]:
    """Times training steps on mix32k without and with FSDP2 on one rank, by turns.

    Returns:
        A row per strategy, with the median over turns and its ratio to the first strategy.
    """
    model = tiny(SHAPES[shape]) if is_tiny else SHAPES[shape]
    lengths = (200, 56) if is_tiny else WORKLOADS["mix32k"].lengths
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in STRATEGIES}
    for _ in range(turns):
        for name, rows in found.items():
            rows.append(time_steps(name, model, lengths, steps, "cpu" if is_tiny else "gpu"))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    medians = {
        name: statistics.median(row["seconds"] for row in rows) for name, rows in found.items()
    }
    return [
        {
            **rows[0],
            "seconds": medians[name],
            "tokens_per_second": sum(lengths) / medians[name],
            "of_plain": medians[name] / medians[STRATEGIES[0]],
        }
        for name, rows in found.items()
    ]


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures shares, then steps, and yields the record after each, so that a limit loses less."""
    device = torch.device("cpu" if options.tiny else "cuda")
    tokens = 512 if options.tiny else options.tokens
    dtype = torch.float32 if options.tiny else torch.bfloat16
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu" if options.tiny else torch.cuda.get_device_name(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": {
            "tokens": tokens,
            "ranks": options.ranks,
            "dropout_p": options.dropout,
            "backend": select_backend(device, dtype, head_dim=HEAD_DIM),
            "shape": SHAPES[options.shape].title,
        },
        "shares": time_shares(tokens, options.ranks, options.rounds, options.dropout, device),
        "steps": [],
    }
    yield record
    if not options.no_steps:
        steps = time_strategies(options.shape, options.tiny, options.steps, options.turns)
        yield record | {"steps": steps}


def table(record: dict[str, Any]) -> str:
    """Returns the record as two tables in Markdown."""
    lines = share_rows(record)
    if record["steps"]:
        lines += ["", *step_rows(record)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, and writes and prints the record."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench shares",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=positive, default=131_072, help="of the document")
    parser.add_argument("--ranks", type=positive, default=8, help="that share it")
    parser.add_argument("--rounds", type=positive, default=5, help="timed ones")
    parser.add_argument("--dropout", type=float, default=0.0, help="of attention weights")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--steps", type=positive, default=12, help="timed ones of every turn")
    parser.add_argument("--turns", type=positive, default=1, help="of the strategies")
    parser.add_argument("--no-steps", action="store_true", help="measures the shares only")
    parser.add_argument("--tiny", action="store_true", help="a trial on a CPU")
    parser.add_argument("--output", type=Path, help="JSON file; default: results/shares/")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("lctrain-bench shares: needs a GPU. --tiny tries it on a CPU.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        is_first = not dist.is_initialized()
        if is_first:
            backend, store = "gloo" if options.tiny else "nccl", f"file://{folder}/store"
            dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
        for record in measure(options):
            output = save(record, options.output)
            print(table(record), flush=True)
        if is_first:
            dist.destroy_process_group()
    print(f"Wrote {output}")
    return 0


def save(record: dict[str, Any], output: Path | None) -> Path:
    """Writes the record as JSON and returns the file; None names it by date and device."""
    name = f"{record['date'][:10].replace('-', '')}-{record['device'].lower().replace(' ', '-')}"
    output = output or results_folder() / "shares" / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, record, indent=1)
    return output


if __name__ == "__main__":
    sys.exit(main())
