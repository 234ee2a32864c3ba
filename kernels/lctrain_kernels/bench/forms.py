"""Times forms of the Hopper backwards in turns: python -m lctrain_kernels.bench.forms --out FILE.

A form is another way to compute the same gradients. Each one is first checked: against float64 on
short documents, and against the first form on the whole workload. FlashAttention-4, or lctrain's
causal attention, takes its turns with the forms.
"""

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lctrain_kernels.bench import differential, dual_chunk
from lctrain_kernels.bench.__main__ import positive
from lctrain_kernels.bench.check import check_ours
from lctrain_kernels.bench.inputs import make_inputs
from lctrain_kernels.bench.measure import Timer, gpu_timer
from lctrain_kernels.bench.peers import PEERS
from lctrain_kernels.bench.run import new_record
from lctrain_kernels.bench.tuning import MAX_DIFFERENCE, relative_difference
from lctrain_kernels.bench.workloads import WORKLOADS, Workload
from lctrain_kernels.strict_json import write_json

Override = Callable[[], contextlib.AbstractContextManager[None]]
Backward = Callable[[], Sequence[Tensor]]
# Twelve documents of one length, between 2,048 tokens and the threshold of long documents.
_12 = Workload("12x2730", (2730,) * 12, 32, 8, 128)
VARLEN = WORKLOADS | {_12.name: _12}


@dataclass(frozen=True)
class Subject:
    """A backward with several forms.

    Attributes:
        workloads: Workloads by name.
        forms: Name -> function that returns a context manager, in which calls have the form. The
            first one is what the others are compared with.
        prepare: Function from a workload to (backward of ours, backward of the peer).
        errors: Function from a workload to the errors of the results on short documents, relative
            to plain PyTorch's.
        peer: Name of the peer.
    """

    workloads: Mapping[str, Any]
    forms: Mapping[str, Override]
    prepare: Callable[[Any, torch.device], tuple[Backward, Backward]]
    errors: Callable[[Any, torch.device], dict[str, Any]]
    peer: str


def _backward(call: Callable[[], Any], leaves: Sequence[Tensor], grads: Any) -> Backward:
    out = call()
    return lambda: torch.autograd.grad(out, leaves, grads, retain_graph=True)


def _varlen(workload: Workload, device: torch.device) -> tuple[Backward, Backward]:
    inputs = make_inputs(workload, device)
    ours, theirs = (
        _backward(PEERS[name].prepare(inputs), inputs.leaves, inputs.grad_out)
        for name in ("lctrain", "fa4")
    )
    return ours, theirs


def _dual_chunk(workload: Workload, device: torch.device) -> tuple[Backward, Backward]:
    inputs = make_inputs(workload, device)
    calls = dual_chunk.lctrain_dual_chunk(inputs), PEERS["lctrain"].prepare(inputs)
    ours, causal = (_backward(call, inputs.leaves, inputs.grad_out) for call in calls)
    return ours, causal


def _differential(
    workload: differential.DifferentialWorkload, device: torch.device
) -> tuple[Backward, Backward]:
    inputs = differential.make_inputs(workload, device)
    ours, theirs = (
        differential.backward_of(differential.CONTENDERS[name], inputs)
        for name in (differential.OURS, "fa4_calls")
    )
    return ours, theirs


def _varlen_forms() -> dict[str, Override]:
    from lctrain_kernels.gluon.config import BackwardTile, override_tiles

    tiles = {
        "dq_warp": BackwardTile(64, 2),
        "dq_warp_3": BackwardTile(64, 3),
        "later": BackwardTile(64, 3, reduce_from_registers=True),
    }
    return {name: partial(override_tiles, backward=tile) for name, tile in tiles.items()}


def _dual_chunk_forms() -> dict[str, Override]:
    from lctrain_kernels.dual_chunk.hopper_support import BackwardForm, override_backward
    from lctrain_kernels.gluon.config import BackwardTile

    forms = {
        "half": BackwardForm(BackwardTile(64, 2)),
        "full": BackwardForm(BackwardTile(64, 2), full_weights=True),
        "full_3": BackwardForm(BackwardTile(64, 3), full_weights=True),
        "later_2": BackwardForm(BackwardTile(64, 2, True), full_weights=True),
        "later": BackwardForm(BackwardTile(64, 3, True), full_weights=True),
    }
    return {name: partial(override_backward, form) for name, form in forms.items()}


def _differential_forms() -> dict[str, Override]:
    from lctrain_kernels.differential.hopper_support import override_backward

    return {
        "dq_warp": partial(override_backward, False),
        "registers": partial(override_backward, True),
    }


def subjects() -> dict[str, Subject]:
    """Returns the backwards with several forms, by name. They import Triton."""
    return {
        "dual_chunk": Subject(
            dual_chunk.WORKLOADS,
            _dual_chunk_forms(),
            _dual_chunk,
            lambda workload, device: dual_chunk.check_dual_chunk(workload, device, "hopper"),
            "causal",
        ),
        "varlen": Subject(VARLEN, _varlen_forms(), _varlen, check_ours, "fa4"),
        "differential": Subject(
            differential.DIFFERENTIAL_WORKLOADS,
            _differential_forms(),
            _differential,
            differential.check,
            "fa4",
        ),
    }


def compile_form(job: tuple[str, str, str]) -> None:
    """Fills Triton's cache with the kernels of a form, in a process of its own.

    Args:
        job: (subject, workload, form).
    """
    subject_name, workload, form = job
    subject = subjects()[subject_name]
    with contextlib.suppress(Exception), subject.forms[form]():  # raised again when it is timed
        subject.errors(subject.workloads[workload], torch.device("cuda"))


def parse_case(text: str, known: Mapping[str, Subject]) -> tuple[str, str, list[str]]:
    """Returns subject, workload and forms of "SUBJECT:WORKLOAD[:FORM,FORM]".

    Args:
        text: Case on the command line; without forms, all of them.
        known: Subjects by name.

    Raises:
        ValueError: if the subject does not have the workload or a form; the message lists them.
    """
    name, workload, *rest = text.split(":")
    if name not in known:
        raise ValueError(f"subject must be one of {', '.join(known)}, got {name!r}.")
    forms = rest[0].split(",") if rest else list(known[name].forms)
    for kind, found, offered in (
        ("workload", [workload], known[name].workloads),
        ("form", forms, known[name].forms),
    ):
        for one in found:
            if one not in offered:
                raise ValueError(f"{kind} must be one of {', '.join(offered)}, got {one!r}.")
    return name, workload, forms


def time_forms(
    subject: Subject,
    workload: Any,
    names: Sequence[str],
    device: torch.device,
    timer: Timer,
    rounds: int,
) -> list[dict[str, Any]]:
    """Checks forms and times them in turns with the peer.

    Args:
        subject: Backward to time.
        workload: Workload of the subject.
        names: Names of the forms.
        device: Device of the tensors.
        timer: Function that returns the milliseconds of a call.
        rounds: Number of turns of each contender.

    Returns:
        One row per form, and one of the peer: name, median ms, ms of each round, error ratios on
        short documents, relative difference from the first form, and whether each gradient has its
        bits. A form that is wrong has the reason as "error", and no times.
    """
    rows: dict[str, dict[str, Any]] = {name: {"form": name} for name in (*names, subject.peer)}
    ours, theirs = subject.prepare(workload, device)
    expected: tuple[Tensor, ...] | None = None
    right = []
    for name in names:
        try:
            with subject.forms[name]():
                errors = subject.errors(workload, device)
                rows[name]["error_ratios"] = {
                    part: round(max(ratio.norm, ratio.maximum), 3) for part, ratio in errors.items()
                }
                if not all(ratio.passes for ratio in errors.values()):
                    raise ValueError("error above twice that of plain PyTorch")
                found = tuple(x.detach().clone() for x in ours())
            expected = found if expected is None else expected
            rows[name]["difference"] = relative_difference(found, expected)
            rows[name]["same_bits"] = [
                torch.equal(a, b) for a, b in zip(found, expected, strict=True)
            ]
            if rows[name]["difference"] >= MAX_DIFFERENCE:
                raise ValueError(f"differs from {names[0]} by {rows[name]['difference']:.1e}")
            right.append(name)
        except Exception as error:  # the other forms are timed
            rows[name]["error"] = f"{type(error).__name__}: {error}"[:200]
    times: dict[str, list[float]] = {name: [] for name in (*right, subject.peer)}
    del expected
    for _ in range(rounds):
        for name in right:
            with subject.forms[name]():
                times[name].append(timer(ours))
        times[subject.peer].append(timer(theirs))
    for name, milliseconds in times.items():
        rows[name] |= {"ms": median(milliseconds), "rounds": milliseconds}
    return list(rows.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Returns 2 without a GPU, 1 if a form is wrong, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument(
        "--cases",
        nargs="+",
        required=True,
        metavar="CASE",
        help="SUBJECT:WORKLOAD[:FORM,FORM], such as dual_chunk:1x32k:half,later",
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--milliseconds", type=positive, default=60)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("This benchmark needs a GPU, and torch sees none.", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    record = new_record([PEERS["fa4"]], device, options.rounds, options.milliseconds)
    report: dict[str, Any] = {"device": record.device, "date": record.date}
    report |= {"versions": record.versions, "settings": record.settings, "cases": []}
    known, timer = subjects(), gpu_timer(options.milliseconds)
    cases = [parse_case(text, known) for text in options.cases]
    jobs = {(name, workload, form) for name, workload, forms in cases for form in forms}
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_form, sorted(jobs)))
    wrong = False
    for name, workload, forms in cases:
        subject = known[name]
        rows = time_forms(
            subject, subject.workloads[workload], forms, device, timer, options.rounds
        )
        report["cases"].append({"subject": name, "workload": workload, "rows": rows})
        write_json(options.out, report, indent=1)
        for row in rows:
            text = row.get("error")
            if text is None:
                ratio = rows[-1]["ms"] / row["ms"]
                text = f"{row['ms']:8.3f} ms  {ratio:.3f}x  {row.get('same_bits', '')}"
            wrong |= "error" in row
            print(f"{name:12} {workload:12} {row['form']:10} {text}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
