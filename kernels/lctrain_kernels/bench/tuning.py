"""Times candidate tile configurations, for tune.py and tune_differential.py.

Candidates are compiled in parallel and timed one by one. A candidate is reported without a time if
it does not compile, does not fit, or gives another result than the table's configuration.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lctrain_kernels.bench.measure import Timer
from lctrain_kernels.bench.workloads import Workload
from lctrain_kernels.strict_json import write_json

MAX_DIFFERENCE = 1e-2  # between two configurations' results in bfloat16, relative norm
TINY_LENGTHS = (300, 20)  # compile what the real workload needs: lengths do not specialise


class Case(Protocol):
    """Protocol of a workload's tensors with the calls of its operations."""

    def run(self, operation: str) -> tuple[Tensor, ...]:
        """Runs the forward or the backward that contains an operation, such as "varlen_dq"."""


@dataclass(frozen=True)
class Tuner:
    """What a tuner times: workloads, candidates, and how to run an operation with a candidate.

    A candidate is a tile configuration as text.

    Attributes:
        workloads: Name -> workload.
        candidates: Operation -> shape -> candidates, separated by spaces.
        shape: Function that returns the property of a workload by which candidates are listed,
            such as its head dim.
        make_case: Function of (workload, dropout probability, operation, device) that returns a
            Case. It must be importable by name, because other processes call it.
        override: Function of (operation, candidate) that returns a context manager, which replaces
            the configuration. It must be importable by name, too.
    """

    workloads: Mapping[str, Any]
    candidates: Mapping[str, Mapping[Any, str]]
    shape: Callable[[Any], Hashable]
    make_case: Callable[[Any, float, str, str], Case]
    override: Callable[[str, str], AbstractContextManager[None]]

    def offered(self, operation: str, workload: Workload) -> list[str]:
        """Returns the candidates that the tuner lists for an operation and the workload's shape."""
        return self.candidates[operation].get(self.shape(workload), "").split()


def relative_difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Returns the largest ||found - expected|| / ||expected|| over pairs of tensors.

    The result is infinite if a difference is NaN.
    """
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    differences = [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs]
    # Not `max` alone: comparisons with NaN are false, so a NaN that comes second would be lost.
    return max((d if d == d else float("inf") for d in differences), default=0.0)


def time_candidates(
    tuner: Tuner,
    workload: Workload,
    operation: str,
    candidates: list[str],
    dropout_p: float,
    timer: Timer,
    device: str = "cuda",
) -> list[dict[str, Any]]:
    """Times each candidate on one workload. Other operations keep the table's configuration.

    Args:
        tuner: Tuner that makes the case and overrides the configuration.
        workload: Workload to time.
        operation: Name of the operation, a key of the candidates such as "varlen_fwd".
        candidates: Configurations in the text form that `override` reads.
        dropout_p: Dropout probability.
        timer: Function that returns the milliseconds of a call.
        device: Device of the tensors.

    Returns:
        One row per candidate: workload, operation, config, dropout_p, ms (None if it failed) and
        error (None if it did not fail).
    """
    case = tuner.make_case(workload, dropout_p, operation, device)
    # Copies: a later run may write into the memory of this one's results.
    expected = tuple(x.float().clone() for x in case.run(operation))
    flops = workload.forward_flops if operation.endswith("_fwd") else workload.backward_flops
    rows = []
    for candidate in candidates:
        row: dict[str, Any] = {"workload": workload.name, "operation": operation}
        row |= {"config": candidate, "dropout_p": dropout_p, "ms": None, "error": None}
        try:
            with tuner.override(operation, candidate):
                difference = relative_difference(case.run(operation), expected)
                if difference >= MAX_DIFFERENCE:
                    raise ValueError(f"result differs from the table's by {difference:.1e}")
                row["ms"] = timer(partial(case.run, operation))
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:120]
        rows.append(row)
        speed = row["error"]
        if row["ms"] is not None:
            speed = f"{row['ms']:8.3f} ms {flops / row['ms'] / 1e9:6.1f} TFLOP/s"
        print(f"{workload.name:12} {operation:14} p={dropout_p} {candidate:22} {speed}", flush=True)
    return rows


def compile_candidate(
    make_case: Callable[[Any, float, str, str], Case],
    override: Callable[[str, str], AbstractContextManager[None]],
    job: tuple[str, str, Workload, float],
) -> None:
    """Fills Triton's cache with a candidate's kernels, by running it once on a tiny pack.

    Runs in a process of its own.

    Args:
        make_case: Tuner.make_case.
        override: Tuner.override.
        job: (operation, candidate, workload, dropout probability).
    """
    operation, candidate, workload, dropout_p = job
    try:
        case = make_case(replace(workload, lengths=TINY_LENGTHS), dropout_p, operation, "cuda")
        with override(operation, candidate):
            case.run(operation)
        torch.cuda.synchronize()
    except Exception as error:  # reported again, with its message, when it is timed
        print(f"compile {operation} {candidate}: {type(error).__name__}", flush=True)


def main(
    tuner: Tuner,
    description: str | None,
    default_workloads: str,
    default_operations: str,
    arguments: list[str] | None = None,
    timer: Timer | None = None,
    device: str = "cuda",
) -> list[dict[str, Any]]:
    """Runs a tuner with the options of the command line.

    The options are --operations, --workloads, --dropout, --candidates and --output.

    Args:
        tuner: Workloads and candidates to time.
        description: Description of the program in --help.
        default_workloads: Names of the default workloads, separated by commas.
        default_operations: Names of the default operations, separated by commas.
        arguments: Arguments that replace those of the command line.
        timer: Timer that replaces the GPU's. Candidates are then not compiled beforehand.
        device: Device of the tensors.

    Returns:
        The rows of `time_candidates`, which are also written to --output after every workload.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--operations", default=default_operations)
    parser.add_argument("--workloads", default=default_workloads)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--candidates", help="space-separated, instead of the built-in list")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    names, operations = options.workloads.split(","), options.operations.split(",")
    for flag, given, known in (
        ("--workloads", names, tuner.workloads),
        ("--operations", operations, tuner.candidates),
    ):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{flag} must be among {', '.join(known)}, got {', '.join(unknown)}.")
    if not 0.0 <= options.dropout < 1.0:
        parser.error(f"--dropout must be in [0, 1), got {options.dropout}.")
    if options.output and not options.output.parent.is_dir():
        parser.error(f"--output must be in a folder that exists, got {options.output}.")
    for operation, text in itertools.product(operations, (options.candidates or "").split()):
        try:
            tuner.override(operation, text)
        except (ValueError, TypeError):
            example = next(iter(tuner.candidates[operation].values())).split()[0]
            parser.error(f"--candidates of {operation} must be like {example}, got {text}.")

    def chosen(operation: str, workload: Workload) -> list[str]:
        return (options.candidates or "").split() or tuner.offered(operation, workload)

    workloads = [tuner.workloads[name] for name in names]
    if timer is None:
        from lctrain_kernels.bench.measure import gpu_timer

        timer = gpu_timer(80)
        by_shape = {(w.heads, w.heads_kv, tuner.shape(w)): w for w in workloads}.values()
        jobs = [
            (operation, candidate, workload, options.dropout)
            for operation, workload in itertools.product(operations, by_shape)
            for candidate in chosen(operation, workload)
        ]
        workers = min(12, os.cpu_count() or 1)
        compile_one = partial(compile_candidate, tuner.make_case, tuner.override)
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            try:
                list(pool.map(compile_one, jobs))
            except BrokenProcessPool:
                print("A candidate ended its process; the rest is compiled when timed.", flush=True)
    rows = []
    for operation, workload in itertools.product(operations, workloads):
        candidates = chosen(operation, workload)
        if not candidates:
            print(f"{workload.name:12} {operation:14} has no candidates", flush=True)
            continue
        rows += time_candidates(
            tuner, workload, operation, candidates, options.dropout, timer, device
        )
        if options.output:  # a run that is cut short keeps what it has
            write_json(options.output, rows, indent=1)
    return rows
