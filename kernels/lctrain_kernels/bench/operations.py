"""`lctrain-bench ops`: times linear cross-entropy and the fused operations beside other libraries.

    lctrain-bench ops --operations rms_norm,swiglu,linear_cross_entropy

Element-wise operations are timed by replaying CUDA graphs. Their figure is a share of the copy
bandwidth: bytes read and written once, over time, over the fastest copy of this GPU. Linear
cross-entropy is timed as a whole, forward and backward, beside its own matrix products.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lctrain_kernels.bench import loss_case
from lctrain_kernels.bench.__main__ import default_output, names_of, positive
from lctrain_kernels.bench.loss_case import LossCase, time_losses
from lctrain_kernels.bench.measure import Timer, Timing, gpu_timer, graph_timer, measure_call
from lctrain_kernels.bench.operation_cases import (
    CASES,
    COMPILED,
    DISTRIBUTIONS,
    EAGER,
    OURS,
    TITLES,
    OperationCase,
)
from lctrain_kernels.bench.operation_report import operation_tables
from lctrain_kernels.bench.peers import installed_version
from lctrain_kernels.bench.record import BenchmarkRecord, Result
from lctrain_kernels.bench.run import DTYPE, new_record

ROWS, VOCABULARY, HIDDEN = 32_768, 128_256, (2048, 4096)
LOSS = "linear_cross_entropy"
OPERATIONS = (LOSS, *CASES)
MODULES = {"liger": "liger_kernel.ops", "quack": "quack", "cce": "cut_cross_entropy"}
MAX_DIFFERENCE = 2e-2
"""Largest relative difference from PyTorch's result: several roundings to bfloat16."""
COPY_MEBIBYTES = (256, 512, 1024, 2048)


def wall_timer(call: Callable[[], object]) -> float:
    """Runs a call on a CPU once, and returns the milliseconds that it takes."""
    import time

    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1000


def copy_bandwidth(device: torch.device, timer: Timer, tiny: bool) -> dict[str, float]:
    """Returns the bandwidth of copies on a device, by their size in MiB.

    The bandwidth is in bytes per second, where read and written bytes both count.

    Args:
        device: Device of the copies.
        timer: Function that returns the milliseconds of a call.
        tiny: Whether to time a copy of 1 MiB only.
    """
    found = {}
    for mebibytes in (1,) if tiny else COPY_MEBIBYTES:
        source = torch.empty(mebibytes * 2**19, dtype=torch.bfloat16, device=device)
        milliseconds = timer(partial(torch.empty_like(source).copy_, source))
        found[str(mebibytes)] = 2 * mebibytes * 2**20 / milliseconds * 1000
    return found


@dataclass(frozen=True)
class Setting:
    """Sizes, device and repetitions of a measurement.

    Attributes:
        rows: Number of rows.
        columns: Width of a row.
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        repetitions: Number of timings. The result is the median.
    """

    rows: int
    columns: int
    device: torch.device
    dtype: torch.dtype
    repetitions: int = 1

    def leaves(self, case: OperationCase, rows: int | None = None) -> Sequence[torch.Tensor]:
        """Draws the tensors of a case that get a gradient; `rows` replaces the number of rows."""
        return case.leaves(rows or self.rows, self.columns, self.device, self.dtype)


def time_case(
    case: OperationCase, names: Sequence[str], setting: Setting, timers: Sequence[Timer]
) -> Iterator[Result]:
    """Times contenders of one operation.

    Args:
        case: Operation to time.
        names: Contenders, among TITLES.
        setting: Sizes and place.
        timers: Timers to try in order. If one fails, for example because a CUDA graph cannot
            capture the contender, the next one is used.

    Yields:
        One result per contender.
    """
    expected = _outputs(case, EAGER, setting)
    for name in (name for name in names if name in case.contenders):
        for timer in timers:
            result = _result(case, name, setting, expected, timer)
            _free(setting.device)
            if result.status != "error":
                break
        if result.status == "ok" and timer is not timers[0]:
            result = replace(result, reason="timed without a CUDA graph")
        yield result


def _result(
    case: OperationCase,
    name: str,
    setting: Setting,
    expected: Sequence[torch.Tensor],
    timer: Timer,
) -> Result:
    workload = f"{case.name}_{setting.columns}"
    try:
        if name != COMPILED:  # it has the code of EAGER
            difference = _difference(_outputs(case, name, setting), expected)
            if not difference < MAX_DIFFERENCE:
                reason = f"differs from PyTorch by {difference:.1e}"
                return Result(workload, name, "failed_check", reason)
        timing, gradients = _time(case, name, setting, timer)
    except Exception as error:  # record the error and time the others
        cause = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return Result(workload, name, "error", cause)
    return Result(
        workload,
        name,
        "ok",
        forward_ms=timing.forward_ms,
        backward_ms=timing.backward_ms,
        peak_bytes=None if timing.peak_bytes is None else max(0, timing.peak_bytes - gradients),
        forward_peak_bytes=timing.forward_peak_bytes,
    )


def _time(case: OperationCase, name: str, setting: Setting, timer: Timer) -> tuple[Timing, int]:
    """Returns the times of a contender, and the bytes of the gradients that it returns."""
    leaves = setting.leaves(case)
    constants = case.constants(leaves)
    function = _function(case, name)
    on_gpu = setting.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(setting.device)  # the leaves come from the default stream
    with torch.cuda.stream(torch.cuda.Stream(setting.device)) if on_gpu else nullcontext():
        call = partial(function, *leaves, *constants)
        grads = [torch.randn_like(out) for out in _as_tuple(call())]
        timing = measure_call(call, leaves, grads, timer, setting.repetitions)
    return timing, sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def _function(case: OperationCase, name: str) -> Callable[..., Any]:
    function = case.contenders[name]
    if name != COMPILED:
        return function
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # one graph is run backward many times
    torch.compiler.reset()  # else the sizes add up to the limit of recompilations
    return torch.compile(function, dynamic=False, fullgraph=True)


def _outputs(case: OperationCase, name: str, setting: Setting) -> Sequence[torch.Tensor]:
    """Returns a contender's outputs on the first rows, in float32, for comparison with others."""
    leaves = setting.leaves(case, min(setting.rows, 64))
    with torch.no_grad():
        outputs = _as_tuple(_function(case, name)(*leaves, *case.constants(leaves)))
    return [out.float() for out in outputs]


def _as_tuple(outputs: Any) -> Sequence[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def _difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def missing_libraries(device: torch.device) -> dict[str, str]:
    """Returns contender -> reason for each library that cannot be timed on this machine."""
    found = {}
    for name, module in MODULES.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # importing a library may raise any error
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            if device.type != "cuda":
                found[name] = "needs a GPU"
    return found


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the options of `lctrain-bench ops` from the command line, or from `arguments`."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench ops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = dict.fromkeys(OPERATIONS)
    parser.add_argument(
        "--operations",
        type=names_of(known, "operations"),
        default=list(OPERATIONS),
        help=f"default: all of {', '.join(OPERATIONS)}",
    )
    contenders = {**TITLES, **loss_case.TITLES}
    parser.add_argument(
        "--contenders",
        type=names_of(contenders, "contenders"),
        default=list(contenders),
        help=f"default: all installed of {', '.join(contenders)}",
    )
    parser.add_argument("--repetitions", type=positive, default=3, help="timings per figure")
    parser.add_argument("--milliseconds", type=positive, default=100, help="length of a timing")
    parser.add_argument("--tiny", action="store_true", help="small tensors, for a trial on a CPU")
    parser.add_argument("--output", type=Path, help="JSON file; default: one in results/ops/")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `lctrain-bench ops`, prints its tables, and writes the record.

    Returns:
        The exit status: 1 if lctrain failed, 2 if the machine cannot run the benchmark, otherwise
        0.
    """
    options = parse_arguments(arguments)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.tiny:
        print(
            "lctrain-bench ops needs a GPU, and torch sees none. Run it on a machine with one, or "
            "try it with --tiny.",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    missing = missing_libraries(device)
    for name in missing:
        if name in options.contenders:
            print(f"{ {**TITLES, **loss_case.TITLES}[name] }: not timed, {missing[name]}")
    names = [name for name in options.contenders if name not in missing]
    record = _new_record(options, device, missing)
    output = options.output or _default_output(record)
    output.parent.mkdir(parents=True, exist_ok=True)
    for _ in fill_record(record, options, names, device):
        record.save(output)
    print(operation_tables(record))
    print(f"Wrote {output}")
    ours = [result.status for result in record.results if result.peer == OURS]
    return int(any(status != "ok" for status in ours))


def fill_record(
    record: BenchmarkRecord, options: argparse.Namespace, names: Sequence[str], device: torch.device
) -> Iterator[str]:
    """Times all operations, and adds the results to the record, one operation and width at a time.

    Args:
        record: Record to which the results are added.
        options: Options of the command line.
        names: Contenders, among TITLES.
        device: Device of the tensors.

    Yields:
        The name of each operation and width, after its results have been added.
    """
    on_gpu = device.type == "cuda"
    slow = gpu_timer(options.milliseconds) if on_gpu else wall_timer
    timers = [graph_timer(options.milliseconds), slow] if on_gpu else [wall_timer]
    dtype = DTYPE if on_gpu else torch.float32
    record.settings["dtype"] = str(dtype).removeprefix("torch.")
    rows = 96 if options.tiny else ROWS
    with torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else nullcontext():
        record.settings["copy_bytes_per_s"] = copy_bandwidth(device, timers[0], options.tiny)
    for operation in options.operations:
        if operation == LOSS:
            for case in _loss_cases(options.tiny):
                found = [name for name in names if name in loss_case.TITLES]
                record.workloads[case.name] = vars(case)
                record.results += time_losses(case, found, device, dtype, slow, options.repetitions)
                _show(record, case.name)
                _free(device)
                yield case.name
            continue
        element = CASES[operation]
        for columns in (32,) if options.tiny else element.columns:
            setting = Setting(rows, columns, device, dtype, options.repetitions)
            forward, backward = element.moved_bytes(setting.leaves(element))
            workload = f"{operation}_{columns}"
            sizes = {"rows": rows, "columns": columns}
            moved = {"forward_bytes": forward, "backward_bytes": backward}
            record.workloads[workload] = sizes | moved
            record.results += time_case(element, names, setting, timers)
            _show(record, workload)
            yield workload


def _loss_cases(tiny: bool) -> list[LossCase]:
    if tiny:
        return [LossCase(40, 96, 32, frozen) for frozen in (False, True)]
    sizes = ((hidden, frozen) for hidden in HIDDEN for frozen in (False, True))
    return [LossCase(ROWS, VOCABULARY, hidden, frozen) for hidden, frozen in sizes]


def _show(record: BenchmarkRecord, workload: str) -> None:
    for result in record.results:
        if result.workload == workload:
            times = (result.forward_ms, result.backward_ms, result.step_ms)
            figures = " / ".join(f"{time:.3f}" for time in times if time is not None)
            print(f"{workload:32s} {result.peer:14s} {figures or result.reason} ms", flush=True)


def _new_record(
    options: argparse.Namespace, device: torch.device, missing: dict[str, str]
) -> BenchmarkRecord:
    record = new_record([], device, options.repetitions, options.milliseconds)
    for distribution in {*DISTRIBUTIONS.values(), *loss_case.DISTRIBUTIONS.values()}:
        version = installed_version(distribution)
        if version is not None:
            record.versions[distribution] = version
    record.settings["titles"] = {**loss_case.TITLES, **TITLES}
    record.settings["missing"] = missing
    return record


def _default_output(record: BenchmarkRecord) -> Path:
    path = default_output(record)
    return path.parent / "ops" / path.name


if __name__ == "__main__":
    sys.exit(main())
