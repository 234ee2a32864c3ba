"""`lctrain-bench memory`: measures peak memory and speed by context length, beside the plan.

    lctrain-bench memory --tokens 32768,131072 --policies offload,auto --output memory.json
    lctrain-bench memory --tokens 524288 --policies auto --mlp-tokens 16384 --host-gib 100 \\
        --warmup-tokens 32768 --steps 1 --progress
    lctrain-bench memory --layers 8 --tokens 131072 --policies checkpoint,offload --rounds 3
    lctrain-bench memory --tokens 1048576 --policies offload --estimate-layers 2,4
    lctrain-bench memory --tiny --tokens 64,128 --contenders lctrain,sdpa

The model has the shape of Llama-3.1-8B with random weights in bfloat16 and LoRA adapters. A step is
forward, backward and AdamW on one pack of random tokens. Peers run with the activation
checkpointing of transformers, each in a process of its own. The record is written before, during
and after every run, so a command that is stopped keeps what it has measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lctrain.allocator import has_expandable_segments
from lctrain.bench.contenders import CONTENDERS, OURS
from lctrain.bench.layer_progress import Report
from lctrain.bench.memory_estimate import (
    ESTIMATED,
    estimate_rest,
    extrapolate,
    joined,
    refusal,
    two_numbers,
    with_fewer,
)
from lctrain.bench.memory_peer import POLICIES as PEER_POLICIES
from lctrain.bench.memory_run import MemoryBench, Steps
from lctrain.bench.shapes import SHAPES, ModelShape, llama_8b, tiny
from lctrain.config import MemoryConfig
from lctrain.config.memory import POLICIES, WITH_HOST
from lctrain.memory.plan import GIB, Plan
from lctrain_kernels.bench.__main__ import names_of, positive
from lctrain_kernels.bench.peers import installed_version
from lctrain_kernels.bench.run import new_record
from lctrain_kernels.strict_json import write_json

UNFINISHED = "unfinished"
_SHAPES = {llama_8b.name: llama_8b, **SHAPES}


class Record:
    """The record of all runs, and its file. Threads may add to it.

    Args:
        path: The JSON file.
        content: The record.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content
        self._lock = threading.Lock()

    def add(self, run: dict[str, Any]) -> None:
        """Adds a run, and writes the file."""
        with self._lock:
            self.content["runs"].append(run)
            self._write()

    def update(self, run: dict[str, Any], **found: Any) -> None:
        """Adds figures to a run of the record, and writes the file."""
        with self._lock:
            run.update(found)
            self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.part")
        write_json(part, self.content, indent=1)
        part.replace(self.path)  # so that a process that is killed leaves a whole file


def describe(run: dict[str, Any]) -> str:
    """Returns one measurement as a line for the terminal."""
    line = f"{run['tokens']:>9,} tokens  {run['contender']} {run['policy']:<10}"
    if "planned_gib" in run:
        line += f"  planned {run['planned_gib']:8.2f} GiB, host {run['planned_host_gib']:7.2f}"
    if run["status"] != "ok":
        return f"{line}  {run['status']} {run.get('reason', '')}".rstrip()
    peak = f"{run['peak_gib']:8.2f} GiB" if "peak_gib" in run else "no peak"
    host = f", host {run['host_gib']:7.2f}" if "host_gib" in run else ""
    how = "estimated" if "estimated_from" in run else "measured"
    return f"{line}  {how} {peak}{host}, {run['tokens_per_s']:,.0f} tokens/s"


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
    parser.add_argument(
        "--contenders",
        type=names_of(dict.fromkeys(CONTENDERS), "contenders"),
        default=[OURS],
        help=f"among {', '.join(CONTENDERS)}; default {OURS}",
    )
    parser.add_argument(
        "--peer-policies",
        type=names_of(dict.fromkeys(PEER_POLICIES), "peer-policies"),
        default=["checkpoint", "offload"],
        help="policies of transformers, for peers; default checkpoint,offload",
    )
    parser.add_argument(
        "--shape", choices=list(_SHAPES), default=llama_8b.name, help=f"default {llama_8b.name}"
    )
    parser.add_argument("--layers", type=positive, help="layers of the model, instead of its own")
    parser.add_argument(
        "--estimate-layers",
        type=two_numbers,
        help="two numbers of layers, such as 2,4: run these, and estimate the model from them",
    )
    parser.add_argument("--rank", type=positive, default=16, help="rank of adapters; default 16")
    parser.add_argument(
        "--full", action="store_true", help="train all weights, in float32, without adapters"
    )
    parser.add_argument(
        "--documents", type=positive, default=1, help="equal documents of the pack; default 1"
    )
    parser.add_argument("--steps", type=positive, default=2, help="timed steps; default 2")
    parser.add_argument(
        "--rounds",
        type=positive,
        default=1,
        help="how often all policies run in turn, each time with --steps steps, so that a change "
        "of the GPU's clock meets all of them; default 1",
    )
    parser.add_argument("--warmup", type=positive, default=1, help="steps before; default 1")
    parser.add_argument(
        "--warmup-tokens",
        type=positive,
        help="length of the steps before, which compile kernels and pin host memory; more than "
        "--mlp-tokens, for the same kernels; default: the length of the timed steps",
    )
    parser.add_argument(
        "--progress", action="store_true", help="report when the GPU reaches each layer"
    )
    for name in ("keep-attention", "host-attention", "reuse-attention", "keep-inputs"):
        zero = None if name == "keep-inputs" else 0
        shown = f"as memory.{name.replace('-', '_')}"
        parser.add_argument(f"--{name}", type=int, default=zero, help=shown)
    parser.add_argument(
        "--segment-layers", type=positive, default=1, help="as the option of memory"
    )
    parser.add_argument(
        "--backward-by-head", action="store_true", help="as memory.backward_by_head=true"
    )
    parser.add_argument("--mlp-tokens", type=positive, help="as memory.mlp_tokens")
    parser.add_argument("--device-gib", type=float, help="as memory.device_gib")
    parser.add_argument("--host-gib", type=float, help="as memory.host_gib")
    parser.add_argument("--plan-only", action="store_true", help="print the plans, and run nothing")
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU trains in seconds")
    parser.add_argument("--output", type=Path, default=Path("memory.json"), help="JSON file")
    parser.add_argument("--append", action="store_true", help="add the runs to the JSON file")
    options = parser.parse_args(arguments)
    if options.warmup_tokens is not None and options.warmup_tokens <= (options.mlp_tokens or 0):
        parser.error(
            f"--warmup-tokens must be above --mlp-tokens ({options.mlp_tokens}), got "
            f"{options.warmup_tokens}: shorter packs have no MLP tiles. Double it."
        )
    if options.estimate_layers is not None:
        layers = shape_of(options).settings["num_hidden_layers"]
        reason = refusal(options, layers, OURS in options.contenders)
        if reason is not None:
            parser.error(reason)
    return options


def shape_of(options: argparse.Namespace) -> ModelShape:
    """Returns the shape of the model that the command line asks for."""
    shape = _SHAPES[options.shape]
    if options.tiny:
        shape = tiny(shape)
    return shape if options.layers is None else with_layers(shape, options.layers)


def with_layers(shape: ModelShape, layers: int) -> ModelShape:
    """Returns the shape with another number of layers."""
    return replace(shape, settings={**shape.settings, "num_hidden_layers": layers})


def open_record(options: argparse.Namespace, shape: ModelShape, device: torch.device) -> Record:
    """Returns a new record, or with `--append` the record of the JSON file."""
    if options.append:
        return Record(options.output, json.loads(options.output.read_text()))
    header = new_record([], device, 1, 0)
    weights = "float32" if options.full else "bfloat16"
    content = {
        "device": header.device,
        "date": header.date,
        "versions": {**header.versions, "transformers": installed_version("transformers")},
        "shape": shape.title,
        "layers": shape.settings["num_hidden_layers"],
        "rank": None if options.full else options.rank,
        "mlp_tokens": options.mlp_tokens,
        "documents": options.documents,
        "precision": "float32" if options.tiny else f"{weights} weights, bf16-mixed",
        "expandable_segments": has_expandable_segments(),
        "planned": "peak of the tensors; planned_reserved_gib has what the allocator loses",
        "runs": [],
    }
    return Record(options.output, content)


def measure(options: argparse.Namespace, device: torch.device) -> None:
    """Measures one contender, and adds its runs to the record."""
    (name,) = options.contenders
    shape = shape_of(options)
    record = open_record(options, shape, device)
    contender = CONTENDERS[name]
    reason = contender.missing(device)
    if reason is not None:
        run = {"contender": name, "policy": "-", "tokens": 0, "status": "missing", "reason": reason}
        record.add(run)
        print(describe(run), flush=True)
        return
    record.content["versions"] |= contender.versions()
    policies = options.policies if name == OURS else options.peer_policies
    if options.estimate_layers is not None and not options.plan_only:
        _estimate(options, device, record, policies)
        return
    bench = _build(options, shape, device)
    for tokens in options.tokens:
        runs = [_start(options, bench, record, policy, tokens) for policy in policies]
        rounds: list[list[dict[str, Any]]] = [[] for _ in runs]
        for _ in range(0 if options.plan_only else options.rounds):
            for (run, config, plan), found in zip(runs, rounds, strict=True):
                report = _reporter(record, run) if options.progress else None
                found.append(bench.measured(config, tokens, plan, report))
                for name in ESTIMATED:  # while the step ran
                    run.pop(name, None)
                record.update(run, **joined(found, tokens))
        for run, _, _ in runs:
            print(describe(run), flush=True)


def _estimate(
    options: argparse.Namespace, device: torch.device, record: Record, policies: Sequence[str]
) -> None:
    """Measures a contender with two numbers of layers, and adds the estimates to the record."""
    shape = shape_of(options)
    layers = shape.settings["num_hidden_layers"]
    is_ours = options.contenders == [OURS]
    planned = _build(options, shape, torch.device("meta")) if is_ours else None
    runs = [
        (tokens, *_start(options, planned, record, policy, tokens))
        for tokens in options.tokens
        for policy in policies
    ]
    measured: list[dict[int, dict[str, Any]]] = [{} for _ in runs]
    for count in options.estimate_layers:
        bench = _build(options, with_layers(shape, count), device)
        for (tokens, run, config, plan), found in zip(runs, measured, strict=True):
            fewer = with_fewer(config, count)
            report = _reporter(record, run, whole=False) if options.progress else None
            found[count] = bench.measured(fewer, tokens, plan, report)
            record.update(run, measured=list(found.values()))
        del bench
        gc.collect()
    for (tokens, run, _, _), found in zip(runs, measured, strict=True):
        with_memory = options.keep_inputs is None
        record.update(run, **extrapolate(found, layers, tokens, with_memory=with_memory))
        print(describe(run), flush=True)


def _build(options: argparse.Namespace, shape: ModelShape, device: torch.device) -> MemoryBench:
    """Builds the model of the one contender that the command line names."""
    return MemoryBench.build(
        options.contenders[0],
        shape,
        device,
        "true" if options.tiny else "bf16-mixed",
        None if options.full else options.rank,
        Steps(options.warmup, options.warmup_tokens, options.steps, options.documents),
    )


def _start(
    options: argparse.Namespace,
    bench: MemoryBench | None,
    record: Record,
    policy: str,
    tokens: int,
) -> tuple[dict[str, Any], MemoryConfig, Plan | None]:
    """Plans one policy at one length, and adds its run to the record.

    Args:
        options: The command line.
        bench: The model to plan; not needed for a peer.
        record: The record.
        policy: Name of the policy.
        tokens: Number of tokens of the pack.

    Returns:
        (the run, the settings of the policy, its plan or None for a peer)
    """
    given: dict[str, Any] = {}
    if policy in ("checkpoint", "offload"):  # the other policies choose for themselves
        given["keep_attention"] = options.keep_attention
        given["segment_layers"] = options.segment_layers
        given["reuse_attention"] = options.reuse_attention
        given["backward_by_head"] = options.backward_by_head
    if policy == "offload":
        given["host_attention"] = options.host_attention
        given["keep_inputs"] = options.keep_inputs
    config = MemoryConfig(
        name=policy,
        mlp_tokens=None if policy == "none" else options.mlp_tokens,
        host_gib=options.host_gib if policy in WITH_HOST else None,
        device_gib=options.device_gib,
        **given,
    )
    (name,) = options.contenders
    run: dict[str, Any] = {"contender": name, "policy": policy, "tokens": tokens}
    plan = None
    if name == OURS and bench is not None:
        plan, found = bench.planned(config, tokens)
        run |= found
    run["status"] = "planned" if options.plan_only else UNFINISHED
    record.add(run)
    return run, config, plan


def _reporter(record: Record, run: dict[str, Any], whole: bool = True) -> Report:
    """Returns the function that prints which layer the GPU has reached, and adds it to a run.

    Args:
        record: The record.
        run: The run.
        whole: Whether the run has all layers of the model. The peak of fewer layers is not the
            run's.
    """

    def report(phase: str, layer: int, seconds: float) -> None:
        print(f"{seconds:7.1f} s  {phase} reached layer {layer}", flush=True)
        reached = [*run.get("progress", ()), [phase, layer, round(seconds, 1)]]
        peak = {}
        if whole and torch.cuda.is_available():  # a step that is stopped keeps the peak until there
            peak = {"peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3)}
        run["progress"] = reached
        rest = estimate_rest(run, run["tokens"]) if whole else {}
        record.update(run, **peak, **rest)

    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Returns 2 if the machine cannot run it."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(given)
    on_gpu = torch.cuda.is_available()
    if not (options.tiny or options.plan_only or on_gpu):
        print(
            "lctrain-bench memory needs a GPU, and torch sees none. Try it with --tiny or "
            "--plan-only.",
            file=sys.stderr,
        )
        return 2
    if len(options.contenders) == 1:
        device = torch.device("cuda" if on_gpu else "meta" if options.plan_only else "cpu")
        measure(options, device)
    else:  # libraries change transformers for the whole process
        for number, name in enumerate(options.contenders):
            command = [sys.executable, "-m", "lctrain.bench.memory", *given, "--contenders", name]
            found = subprocess.run(command + ["--append"] * (number > 0), check=False)
            if found.returncode != 0:
                print(f"{name} ended with exit code {found.returncode}", file=sys.stderr)
    print(f"Wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
