"""`lctrain-bench memory`: measures peak memory and speed by context length, beside the plan.

    lctrain-bench memory --tokens 32768,131072 --policies offload,auto --output memory.json
    lctrain-bench memory --tiny --tokens 64,128

The model has the shape of Llama-3.1-8B with random weights in bfloat16 and LoRA adapters. A step is
forward, backward and AdamW on one document of random tokens. The record is written after every run,
so a command that is stopped keeps what it has measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lctrain.bench.shapes import ModelShape, build_shape, llama_8b, tiny
from lctrain.bench.step_process import random_pack, time_step
from lctrain.config import AdapterConfig, MemoryConfig
from lctrain.config.memory import POLICIES, WITH_HOST
from lctrain.loss import causal_lm_loss
from lctrain.memory.plan import GIB
from lctrain.memory.policy import apply_config, plan_for
from lctrain.models import patch_model
from lctrain.models.low_rank import add_adapter, leave_casts_to_autocast
from lctrain_kernels.bench.__main__ import names_of, positive
from lctrain_kernels.bench.peers import installed_version
from lctrain_kernels.bench.run import new_record


@dataclass(frozen=True)
class Bench:
    """The model that is measured, and how.

    Attributes:
        model: A patched PeftModel, on the device on which it is measured.
        shape: Shape of the model.
        precision: "bf16-mixed" on a GPU, as in training, else "true".
        warmup: Number of steps before the timed ones.
        steps: Number of timed steps.
        initial: Values of the trained weights at the beginning of every measurement.
    """

    model: Any
    shape: ModelShape
    precision: str
    warmup: int
    steps: int
    initial: tuple[torch.Tensor, ...]

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    def planned(self, config: MemoryConfig, tokens: int) -> dict[str, Any]:
        """Returns the predicted bytes of a memory policy, without the reserve for CUDA."""
        begin = time.perf_counter()
        plan = plan_for(self.model, config, tokens, self.precision)
        return {
            "policy": config.name,
            "tokens": tokens,
            "planned_policy": plan.policy,
            "planned_gib": round((plan.device_bytes - plan.parts["reserve"]) / GIB, 3),
            "planned_host_gib": round(plan.host_bytes / GIB, 3),
            "planned_fits": plan.fits,
            "planned_longest": plan.longest,
            "plan_s": round(time.perf_counter() - begin, 1),
            "layers": [f"{layer.inputs}/{layer.attention}" for layer in plan.policies],
        }

    def measured(self, config: MemoryConfig, tokens: int) -> dict[str, Any]:
        """Runs training steps under a memory policy, and returns the measured figures.

        The result holds `status`. Unless memory runs out, it also holds step_ms of every step,
        tokens_per_s, loss, host_gib and, on a GPU, peak_gib and reserved_gib.
        """
        handle = None
        try:
            handle = apply_config(self.model, config, tokens, self.precision)
            found = self._steps(tokens)
            store = None if handle is None else handle.store
            found["host_gib"] = 0.0 if store is None else round(store.capacity / GIB, 3)
            found["left_on_device"] = 0 if store is None else store.left_on_device
            return {"status": "ok", **found}
        except torch.OutOfMemoryError as error:
            return {"status": "out_of_memory", "reason": str(error).splitlines()[0][:200]}
        finally:
            if handle is not None:
                handle.remove()
            self.model.zero_grad(set_to_none=True)
            del handle
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _steps(self, tokens: int) -> dict[str, Any]:
        device, model = self.device, self.model
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():  # every run begins with the same weights
            for parameter, value in zip(trained, self.initial, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        batch = random_pack([tokens], self.shape).to(device)
        mixed = self.precision == "bf16-mixed"
        losses = []

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext():
                loss, count = causal_lm_loss(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach() / count)

        for _ in range(self.warmup):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        timed = [time_step(step, device)[0] for _ in range(self.steps)]
        found = {
            "step_ms": [round(milliseconds, 1) for milliseconds in timed],
            "tokens_per_s": round(1000 * tokens / median(timed), 1),
            "loss": round(float(losses[0]), 4),
        }
        if device.type == "cuda":
            found["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / GIB, 3)
            found["reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / GIB, 3)
        return found


def describe(run: dict[str, Any]) -> str:
    """Returns one measurement as a line for the terminal."""
    line = f"{run['tokens']:>9,} tokens  {run['policy']:<10}  planned {run['planned_gib']:8.2f} GiB"
    line += f", host {run['planned_host_gib']:7.2f}"
    if run["status"] != "ok":
        return f"{line}  {run['status']}"
    peak = f"{run['peak_gib']:8.2f} GiB" if "peak_gib" in run else "no GPU"
    return (
        f"{line}  measured {peak}, host {run['host_gib']:7.2f}, {run['tokens_per_s']:,.0f} tokens/s"
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tokens",
        type=lambda text: [positive(part) for part in text.split(",")],
        default=[32_768, 65_536, 131_072],
        help="context lengths; default 32768,65536,131072",
    )
    parser.add_argument(
        "--policies",
        type=names_of(dict.fromkeys(POLICIES), "policies"),
        default=["checkpoint", "offload", "auto"],
        help="default checkpoint,offload,auto",
    )
    parser.add_argument("--layers", type=positive, help="layers of the model, instead of 32")
    parser.add_argument("--rank", type=positive, default=16, help="rank of adapters; default 16")
    parser.add_argument("--steps", type=positive, default=2, help="timed steps; default 2")
    parser.add_argument("--warmup", type=positive, default=1, help="steps before; default 1")
    parser.add_argument("--keep-attention", type=int, default=0, help="as memory.keep_attention")
    parser.add_argument(
        "--segment-layers", type=positive, default=1, help="as the option of memory"
    )
    parser.add_argument("--mlp-tokens", type=positive, help="as memory.mlp_tokens")
    parser.add_argument("--device-gib", type=float, help="as memory.device_gib")
    parser.add_argument("--host-gib", type=float, help="as memory.host_gib")
    parser.add_argument("--plan-only", action="store_true", help="print the plans, and run nothing")
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU trains in seconds")
    parser.add_argument("--output", type=Path, default=Path("memory.json"), help="JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Returns 2 if the machine cannot run it."""
    options = parse_arguments(arguments)
    on_gpu = torch.cuda.is_available()
    if not (options.tiny or options.plan_only or on_gpu):
        print(
            "lctrain-bench memory needs a GPU, and torch sees none. Try it with --tiny or "
            "--plan-only.",
            file=sys.stderr,
        )
        return 2
    shape = tiny(llama_8b) if options.tiny else llama_8b
    if options.layers is not None:
        settings = {**shape.settings, "num_hidden_layers": options.layers}
        shape = replace(shape, settings=settings)
    device = torch.device("cuda" if on_gpu else "meta" if options.plan_only else "cpu")
    model = build_shape(shape, "sdpa", device, torch.float32 if options.tiny else torch.bfloat16)
    patch_model(model, fused=True)
    model = add_adapter(model, AdapterConfig(rank=options.rank)).train()
    header = new_record([], device, 1, 0)
    record: dict[str, Any] = {
        "device": header.device,
        "date": header.date,
        "versions": {**header.versions, "transformers": installed_version("transformers")},
        "shape": shape.title,
        "layers": shape.settings["num_hidden_layers"],
        "rank": options.rank,
        "mlp_tokens": options.mlp_tokens,
        "precision": "float32" if options.tiny else "bfloat16 weights, bf16-mixed",
        "planned": "without the reserve for CUDA's context and what the allocator cannot use",
        "runs": [],
    }
    precision = "true" if options.tiny else "bf16-mixed"
    if precision == "bf16-mixed":
        leave_casts_to_autocast(model)
    initial = tuple(p.detach().clone() for p in model.parameters() if p.requires_grad)
    bench = Bench(model, shape, precision, options.warmup, options.steps, initial)
    for tokens in options.tokens:
        for policy in options.policies:
            chosen = policy in ("checkpoint", "offload")
            config = MemoryConfig(
                name=policy,
                keep_attention=options.keep_attention if chosen else 0,
                segment_layers=options.segment_layers if chosen else 1,
                mlp_tokens=None if policy == "none" else options.mlp_tokens,
                host_gib=options.host_gib if policy in WITH_HOST else None,
                device_gib=options.device_gib,
            )
            run = bench.planned(config, tokens)
            run |= {"status": "planned"} if options.plan_only else bench.measured(config, tokens)
            record["runs"].append(run)
            print(describe(run), flush=True)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"Wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
