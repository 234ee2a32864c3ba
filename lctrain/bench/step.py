"""`lctrain-bench step`: times whole training steps of lctrain and of every installed peer.

    lctrain-bench step                                     # every figure of the documents' table
    lctrain-bench step --shapes llama-1b --checkpointing none --contenders lctrain,fa4_liger

A step is forward and backward of a transformers model on one pack, in bfloat16, with AdamW if asked
for. Each contender has a process of its own, because Liger patches transformers for the whole
process. The processes take turns: every round measures each contender once, so that a change of the
GPU's clock affects all of them. A reported figure is the median over rounds of the median over
steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lctrain.bench.contenders import CONTENDERS, NEEDS_GPU, OURS
from lctrain.bench.shapes import SHAPES, tiny
from lctrain.bench.step_process import CHECKPOINTING, Job
from lctrain_kernels.bench.__main__ import default_output, names_of, positive
from lctrain_kernels.bench.peers import installed_version
from lctrain_kernels.bench.run import new_record
from lctrain_kernels.bench.step_report import CHECKPOINTED, KEPT, step_table
from lctrain_kernels.bench.workloads import WORKLOADS, lognormal_lengths
from lctrain_kernels.strict_json import write_json

PROCESS = "lctrain.bench.step_process"
TITLES = {"none": "none", "full": CHECKPOINTED, "kept": KEPT}
MFU = (
    "FLOPs of a step over its time and the GPU's dense bf16 peak. FLOPs: 6 per token and matrix "
    "weight (output projection included, embedding look-up not), 12 * heads * head_dim per visible "
    "(query, key) pair and layer; recomputation is not counted"
)
Turns = list[dict[str, Any]]


class StepProcess:
    """The process of one contender: it runs jobs one at a time, and is restarted if it dies.

    Args:
        name: Name of the contender.
        module: Module that answers the jobs; None takes PROCESS.

    Attributes:
        missing: Reason why the contender cannot run here, or None.
        versions: Versions of its packages.
    """

    def __init__(self, name: str, module: str | None = None) -> None:
        self.name, self._module = name, module
        self.missing: str | None = None
        self.versions: dict[str, str] = {}
        self._process: subprocess.Popen[str] | None = None
        self._ready = False

    def start(self) -> None:
        """Starts the process; `wait` reads its first answer."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module or PROCESS, self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ready = False

    def wait(self) -> None:
        """Waits until the process has imported its libraries, and reads its first answer."""
        if self._process is None:
            self.start()
        hello = self._answer()
        self.missing = hello.get("missing", hello.get("reason"))
        self.versions = hello.get("versions", {})
        self._ready = True

    def measure(self, job: Any) -> dict[str, Any]:
        """Sends a job, and returns the answer; if the process dies, an answer with the error."""
        if self._process is None or not self._ready:
            self.wait()
        if self.missing is not None or self._process is None or self._process.stdin is None:
            return {"status": "error", "reason": self.missing or "the process has ended"}
        try:
            self._process.stdin.write(json.dumps(asdict(job)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says how the process ended
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self.close()
        return {"status": "error", "reason": f"the process ended with exit code {code}"}


def settings_of(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Returns the combinations (shape, workload, checkpointing) to measure, in order."""
    return [
        (shape, workload, checkpointing)
        for shape in options.shapes
        for checkpointing in options.checkpointing
        for workload in options.workloads
    ]


def shorten(lengths: Sequence[int]) -> tuple[int, ...]:
    """Returns the lengths divided by 500, but at least 2, for a trial on a CPU."""
    return tuple(max(2, length // 500) for length in lengths)


def make_job(
    options: argparse.Namespace, shape: str, workload: str, checkpointing: str, last: bool
) -> Job:
    """Returns the job of one setting; only the last round has untimed steps and a profile."""
    lengths = WORKLOADS[workload].lengths
    mixed = [
        lognormal_lengths(sum(lengths), seed=seed)
        for seed in range(1, options.mixed_steps + 1 if last else 1)
    ]
    if options.tiny:
        lengths, mixed = shorten(lengths), [shorten(one) for one in mixed]
    return Job(
        shape=shape,
        lengths=lengths,
        checkpointing=checkpointing,
        optimizer=options.optimizer,
        steps=options.steps,
        mixed=mixed,
        profile=options.profile and last,
        tiny=options.tiny,
    )


def combine(turns: Turns, tokens: int) -> dict[str, Any]:
    """Combines all rounds of one contender on one setting into one result, with medians.

    Args:
        turns: Answers of the contender's process, one per round.
        tokens: Number of tokens of the pack.
    """
    good = [turn for turn in turns if turn["status"] == "ok"]
    if not good:
        return {"status": turns[-1]["status"], "reason": turns[-1]["reason"]}
    rounds = [median(turn["step_ms"]) for turn in good]
    milliseconds = median(rounds)
    last = good[-1]
    peak = last["peak_flops"]
    mfu = None if peak is None else last["flops"] / (milliseconds / 1000) / peak
    memory = [turn["peak_gib"] for turn in good if turn["peak_gib"] is not None]
    return {
        "status": "ok",
        "step_ms": round(milliseconds, 2),
        "round_ms": [round(value, 2) for value in rounds],
        "tokens_per_s": round(tokens / milliseconds * 1000),
        "mfu": None if mfu is None else round(mfu, 4),
        "peak_gib": max(memory, default=None),
        "reserved_gib": last.get("reserved_gib"),
        "host_ms": round(median(turn["host_ms"] for turn in good), 2),
        "loss": last["loss"],
        "parameters": last["parameters"],
        "allocator_retries": sum(turn.get("allocator_retries", 0) for turn in good),
        **({"profile": last["profile"]} if "profile" in last else {}),
    }


def run_setting(
    options: argparse.Namespace,
    processes: Mapping[str, StepProcess],
    setting: tuple[str, str, str],
) -> list[dict[str, Any]]:
    """Measures one setting in rounds, and returns one result per contender."""
    shape, workload, checkpointing = setting
    names = [name for name in processes if checkpointing != "kept" or name == OURS]
    turns: dict[str, Turns] = {name: [] for name in names}
    for number in range(options.rounds):
        job = make_job(options, *setting, last=number == options.rounds - 1)
        for name in names:
            if not turns[name] or turns[name][-1]["status"] == "ok":
                turns[name].append(processes[name].measure(job))
    title = tiny(SHAPES[shape]).title if options.tiny else SHAPES[shape].title
    return [
        {
            "contender": CONTENDERS[name].title,
            "shape": title,
            "workload": workload,
            "checkpointing": TITLES[checkpointing],
            **combine(turns[name], sum(job.lengths)),
        }
        for name in names
    ]


def describe(run: Mapping[str, Any]) -> str:
    """Returns one result as a line for the terminal."""
    widths = {"shape": 14, "workload": 10, "checkpointing": 36, "contender": 40}
    head = " ".join(f"{run[name]:{width}s}" for name, width in widths.items())
    if run["status"] != "ok":
        return f"{head} {run['status'].replace('_', ' ')}: {run['reason']}"
    mfu = "" if run["mfu"] is None else f"  MFU {run['mfu']:.3f}"
    memory = "" if run["peak_gib"] is None else f"  {run['peak_gib']:.1f} GiB"
    line = f"{head} {run['step_ms']:9.1f} ms {run['tokens_per_s']:9,} tokens/s{mfu}{memory}"
    return f"{line}  host {run['host_ms']:.0f} ms"


def load_record(path: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record to which the runs are added: the file's, or a new one.

    Args:
        path: File of the record; it may not exist.
        now: A record without runs that describes this machine and this command.

    Raises:
        ValueError: if the file is of another device, other versions or other settings.
    """
    if not path.exists():
        return dict(now)
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--output must be a JSON record, got {path}: {error}. Move it.") from None
    if not isinstance(record, dict) or "runs" not in record:
        raise ValueError(f"--output must be a record of steps, got {path}. Choose another file.")
    shared = record["versions"].keys() & now["versions"].keys()
    then = {**record, "versions": {name: record["versions"][name] for name in shared}}
    same = {**now, "versions": {name: now["versions"][name] for name in shared}}
    for key in ("device", "versions", "settings"):
        if then.get(key) != same[key]:
            raise ValueError(
                f"--output must be a new file or a record with the same {key}, got {path} with "
                f"{then.get(key)}, and this run has {same[key]}. Choose another file."
            )
    return {
        **record,
        "versions": {**record["versions"], **now["versions"]},
        "missing": {**record.get("missing", {}), **now["missing"]},
    }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Contenders:\n"
        + "\n".join(f"  {c.name:12s} {c.title}" for c in CONTENDERS.values()),
    )
    known = dict.fromkeys(CHECKPOINTING)
    parser.add_argument("--shapes", type=names_of(SHAPES, "shapes"), default=list(SHAPES))
    parser.add_argument(
        "--workloads",
        type=names_of(WORKLOADS, "workloads"),
        default=["mix32k", "1x32k"],
        help="only their documents count; default mix32k,1x32k",
    )
    parser.add_argument(
        "--checkpointing",
        type=names_of(known, "checkpointing"),
        default=list(CHECKPOINTING),
        help="none, full (every layer), kept (every layer, attention outputs kept: lctrain only)",
    )
    parser.add_argument(
        "--contenders",
        type=names_of(CONTENDERS, "contenders"),
        default=list(CONTENDERS),
        help="default: all installed",
    )
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=positive, default=5, help="timed steps of a turn")
    parser.add_argument("--optimizer", action="store_true", help="add the step of fused AdamW")
    parser.add_argument(
        "--mixed-steps",
        type=int,
        default=0,
        metavar="N",
        help="untimed steps on packs of other lengths, which count the allocator's retries",
    )
    parser.add_argument("--profile", action="store_true", help="add the kernels of one step")
    parser.add_argument("--tiny", action="store_true", help="models that a CPU trains in seconds")
    parser.add_argument("--output", type=Path, help="JSON file; a record that exists is continued")
    options = parser.parse_args(arguments)
    if options.mixed_steps < 0:
        parser.error(f"--mixed-steps must be at least 0, got {options.mixed_steps}.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Returns 1 if lctrain failed, 2 if the machine cannot run it."""
    options = parse_arguments(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print(
            "lctrain-bench step needs a GPU, and torch sees none. Run it on a machine with one, or "
            "try it with --tiny.",
            file=sys.stderr,
        )
        return 2
    processes = {name: StepProcess(name) for name in options.contenders}
    for name, process in processes.items():
        process.missing = None if _may_run(name) else NEEDS_GPU
    try:
        started = [process for name, process in processes.items() if _may_run(name)]
        for process in started:
            process.start()
        for process in started:
            process.wait()
        return _run(options, processes)
    except ValueError as error:
        print(f"lctrain-bench step: {error}", file=sys.stderr)
        return 2
    finally:
        for process in processes.values():
            process.close()


def _may_run(name: str) -> bool:
    return torch.cuda.is_available() or CONTENDERS[name].on_cpu


def _run(options: argparse.Namespace, processes: Mapping[str, StepProcess]) -> int:
    missing = {
        CONTENDERS[name].title: process.missing
        for name, process in processes.items()
        if process.missing is not None
    }
    for title, reason in missing.items():
        print(f"{title}: not measured, {reason}")
    present = {name: process for name, process in processes.items() if process.missing is None}
    record, output = _new_record(options, present, missing)
    first = max((run["run"] for run in record["runs"]), default=0) + 1
    failed = OURS in options.contenders and OURS not in present
    for setting in settings_of(options):
        for run in run_setting(options, present, setting):
            record["runs"].append({"run": first, "steps": options.steps, **run})
            print(describe(run), flush=True)
            failed |= run["contender"] == CONTENDERS[OURS].title and run["status"] != "ok"
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, record, indent=1)
    print(step_table(record))
    print(f"Wrote {output}")
    return int(failed)


def _new_record(
    options: argparse.Namespace,
    processes: Mapping[str, StepProcess],
    missing: Mapping[str, str | None],
) -> tuple[dict[str, Any], Path]:
    """Returns the record to fill, and its file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    header = new_record([], device, options.rounds, 0)
    versions = {**header.versions, "transformers": installed_version("transformers")}
    for process in processes.values():
        versions |= process.versions
    work = "with fused AdamW" if options.optimizer else "no optimizer"
    record = {
        "device": header.device,
        "date": header.date,
        "versions": versions,
        "settings": {
            "dtype": "bfloat16" if device.type == "cuda" else "float32",
            "steps": f"forward and backward, {work}; median over interleaved rounds of the median "
            "of a round's steps",
            "processes": "each contender in a process of its own",
            "mfu": MFU,
            "optimizer": options.optimizer,
        },
        "missing": dict(missing),
        "runs": [],
    }
    output = options.output or _default_output(header)
    return load_record(output, record), output


def _default_output(header: Any) -> Path:
    path = default_output(header)
    return path.parent / "step" / path.name


if __name__ == "__main__":
    sys.exit(main())
