"""`lctrain-bench curves`: loss curves with all kernels of lctrain, and without any.

    lctrain-bench curves                     # on a GPU: 200 steps, three seeds, minutes
    lctrain-bench curves --tiny              # on a CPU: a tiny model, seconds

"On" is `patch_model(model, attention="flash", fused=True, loss=True)`; "off" is the model as
transformers has it, with SDPA. Both start from the same weights and train on the same packs: Python
files of the standard library, with their bytes as tokens. Only the weights differ between seeds, so
the spread of the seeds is that of the initialisation.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from lctrain.batch import PackedBatch
from lctrain.bench.contenders import CONTENDERS, OURS
from lctrain.bench.shapes import SHAPES, ModelShape, llama_100m, tiny
from lctrain.config import OptimConfig
from lctrain.data.packing import plan_rows
from lctrain.data.sources import StdlibSource
from lctrain.eval.plots import INK, LINE, MUTED, new_figure
from lctrain.optim import build_optimizer, build_scheduler
from lctrain.pluralize import pluralize
from lctrain_kernels.bench.__main__ import default_output, positive
from lctrain_kernels.bench.peers import installed_version
from lctrain_kernels.bench.run import new_record
from lctrain_kernels.strict_json import write_json

CURVE_SHAPES = {llama_100m.name: llama_100m, **SHAPES}
KINDS = {"on": OURS, "off": "sdpa"}
MIN_BYTES = 4 * 2**20
Curves = dict[str, list[list[float]]]


def read_packs(count: int, max_tokens: int) -> list[PackedBatch]:
    """Returns packs of the standard library's files, with their bytes as tokens.

    Args:
        count: Number of packs.
        max_tokens: Capacity of a pack in tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        size = max(MIN_BYTES, 3 * count * max_tokens)  # one long file may end the choice early
        texts = StdlibSource(max_bytes=size).load(Path(folder))["text"]
        documents = [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
    documents = [document for document in documents if len(document) > 1]
    plan = plan_rows(np.array([len(document) for document in documents]), max_tokens)
    order = np.random.default_rng(0).permutation(len(plan))[:count]
    if len(order) < count:
        raise ValueError(
            f"the standard library must fill {pluralize(count, 'pack')} of {max_tokens} tokens, "
            "got "
            f"{len(order)}. Use fewer --steps or fewer --tokens."
        )
    return [
        PackedBatch.from_documents(
            [
                documents[plan.documents[piece]][plan.starts[piece] :][: plan.lengths[piece]]
                for piece in plan.row(row)
            ]
        )
        for row in order.tolist()
    ]


def train(
    kind: str, seed: int, shape: ModelShape, packs: Sequence[PackedBatch], device: torch.device
) -> list[float]:
    """Trains one model and returns its loss at every step.

    Weights are float32; on a GPU products are in bfloat16 by autocast.

    Args:
        kind: "on" trains with lctrain's attention, fused modules and loss; "off" without them.
        seed: Seed of the weights.
        shape: Shape of the model.
        packs: One pack per step.
        device: Device of the model.
    """
    contender = CONTENDERS[KINDS[kind]]
    model = contender.build(shape, device, torch.float32, seed)
    config = OptimConfig(learning_rate=1e-3, schedule="constant")
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, len(packs))
    losses = []
    for pack in packs:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
            loss = model(**contender.arguments(pack.to(device))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    return torch.stack(losses).double().tolist()


def compare(curves: Curves) -> dict[str, float | bool]:
    """Compares the difference between on and off with the spread of the seeds.

    Args:
        curves: Losses by kind ("on" or "off"), seed and step.

    Returns:
        Means over the second half of the steps: spread (highest minus lowest seed of "off"),
        difference (on minus off with the same seed, absolute, mean of the seeds), and the largest
        difference; within_spread is True if the difference is below the spread.
    """
    on, off = np.array(curves["on"]), np.array(curves["off"])
    later = slice(on.shape[1] // 2, None)
    differences = np.abs(on - off)[:, later].mean(axis=0)
    spread = np.ptp(off[:, later], axis=0)
    return {
        "spread": float(spread.mean()),
        "difference": float(differences.mean()),
        "largest_difference": float(differences.max()),
        "final_loss_on": fmean(on[:, -1].tolist()),
        "final_loss_off": fmean(off[:, -1].tolist()),
        "within_spread": bool(differences.mean() < spread.mean()),
    }


def plot(curves: Curves, title: str, path: Path) -> None:
    """Draws the means over seeds with a band from lowest to highest, and the differences.

    Args:
        curves: Losses by kind ("on" or "off"), seed and step.
        title: Title of the picture.
        path: PNG file to write.
    """
    figure = new_figure(height=6.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    steps = np.arange(1, len(curves["on"][0]) + 1)
    for kind, color in (("off", MUTED), ("on", LINE)):
        losses = np.array(curves[kind])
        upper.plot(steps, losses.mean(axis=0), color=color, label=f"lctrain {kind}")
        upper.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.2)
    on, off = np.array(curves["on"]), np.array(curves["off"])
    lower.plot(steps, np.ptp(off, axis=0), color=MUTED, label="spread of the seeds, off")
    lower.plot(steps, np.abs(on - off).mean(axis=0), color=LINE, label="|on - off|, mean of seeds")
    lower.set_yscale("log")
    upper.set_ylabel("Loss per token", color=INK)
    lower.set_xlabel("Step", color=INK)
    upper.set_title(title, color=INK)
    for axes in (upper, lower):
        axes.legend(frameon=False)
    figure.savefig(path)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=list(CURVE_SHAPES), default=llama_100m.name)
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds, from 0")
    parser.add_argument("--tokens", type=positive, default=8192, help="of a pack")
    parser.add_argument("--tiny", action="store_true", help="tiny model, packs of 256 tokens")
    parser.add_argument("--output", type=Path, help="JSON file; the picture lies beside it")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds must be at least 2, got 1. One seed has no spread.")
    if options.tokens < 2:
        parser.error("--tokens must be at least 2, got 1. One token leaves nothing to predict.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains all curves. Returns 1 if they differ by more than seeds do, 2 without a GPU."""
    options = parse_arguments(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        print(
            "lctrain-bench curves needs a GPU, and torch sees none. Run it on a machine with one, "
            "or try it with --tiny.",
            file=sys.stderr,
        )
        return 2
    shape = CURVE_SHAPES[options.shape]
    shape, tokens = (tiny(shape), 256) if options.tiny else (shape, options.tokens)
    packs = read_packs(options.steps, tokens)
    curves: Curves = {kind: [] for kind in KINDS}
    for seed in range(options.seeds):
        for kind in ("off", "on"):
            losses = train(kind, seed, shape, packs, device)
            curves[kind].append(losses)
            print(f"seed {seed} {kind:3s} {losses[0]:.4f} -> {losses[-1]:.4f}", flush=True)
    found = compare(curves)
    header = new_record([], device, 1, 0)
    default = default_output(header)
    output = options.output or default.parent / "curves" / default.name
    record: dict[str, Any] = {
        "device": header.device,
        "date": header.date,
        "versions": {**header.versions, "transformers": installed_version("transformers")},
        "settings": {
            "shape": shape.title,
            "steps": options.steps,
            "seeds": options.seeds,
            "tokens": tokens,
            "precision": "bf16 autocast" if device.type == "cuda" else "float32",
        },
        "comparison": found,
        "curves": curves,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, record, indent=1)
    plot(curves, f"{shape.title}, {header.device}", output.with_suffix(".png"))
    print(
        f"on and off differ by {found['difference']:.2e}, seeds by {found['spread']:.2e} (means "
        f"of the second half)\nWrote {output} and {output.with_suffix('.png')}"
    )
    return int(not found["within_spread"])


if __name__ == "__main__":
    sys.exit(main())
