"""Runs `lctrain-bench`: times every peer on every workload, in one process, on the same tensors."""

import datetime
import gc
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from lctrain_kernels.bench.check import check_ours
from lctrain_kernels.bench.inputs import AttentionInputs, make_inputs
from lctrain_kernels.bench.measure import Timer, measure
from lctrain_kernels.bench.peers import OURS, Peer, UnsupportedWorkload, installed_version
from lctrain_kernels.bench.record import BenchmarkRecord, Result
from lctrain_kernels.bench.workloads import Workload

DTYPE = torch.bfloat16


def new_record(
    peers: Sequence[Peer], device: torch.device, repetitions: int, milliseconds: int
) -> BenchmarkRecord:
    """Returns a record without results, with the device, date, settings and versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        versions["CUDA"] = torch.version.cuda
    for name in ("triton", *(peer.distribution for peer in peers)):
        version = installed_version(name)
        if name not in versions and version is not None:
            versions[name] = version
    on_gpu = device.type == "cuda"
    return BenchmarkRecord(
        device=torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        versions=versions,
        settings={
            "dtype": str(DTYPE).removeprefix("torch."),
            "repetitions": repetitions,
            "milliseconds": milliseconds,
        },
    )


def run_workloads(
    record: BenchmarkRecord,
    workloads: Sequence[Workload],
    peers: Sequence[Peer],
    device: torch.device,
    timer: Timer,
    *,
    repetitions: int = 1,
    check: bool = False,
) -> Iterator[str]:
    """Adds the results to the record, one workload after the other.

    Args:
        record: Record to which the results are added.
        workloads: Workloads to time.
        peers: Peers to time.
        device: Device of the runs.
        timer: Function that returns the milliseconds of a call.
        repetitions: Number of times that each peer is timed. The result is the median.
        check: Whether to check lctrain against float64 first. A kernel that fails gets no figures.

    Yields:
        The name of each workload, after its results have been added to the record.
    """
    for workload in workloads:
        record.workloads[workload.name] = asdict(workload)
        ratios = None
        inputs = None
        for peer in peers:
            if check and peer.name == OURS:
                found = check_ours(workload, device)
                ratios = {name: round(max(r.norm, r.maximum), 3) for name, r in found.items()}
                failed = [name for name, ratio in found.items() if not ratio.passes]
                if failed:
                    reason = f"error above twice that of plain PyTorch: {ratios}"
                    name, status = workload.name, "failed_check"
                    record.results.append(
                        Result(name, peer.name, status, reason, error_ratios=ratios)
                    )
                    continue
            inputs = inputs or make_inputs(workload, device, DTYPE)
            shown = ratios if peer.name == OURS else None
            record.results.append(_time(peer, inputs, timer, repetitions, shown))
            _free(device)
        del inputs
        _free(device)
        yield workload.name


def _time(
    peer: Peer,
    inputs: AttentionInputs,
    timer: Timer,
    repetitions: int,
    error_ratios: dict[str, float] | None,
) -> Result:
    workload = inputs.workload
    try:
        timing = measure(peer, inputs, timer, repetitions)
    except UnsupportedWorkload as reason:
        return Result(workload.name, peer.name, "unsupported", str(reason))
    except Exception as error:  # record the error and time the other peers
        cause = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return Result(workload.name, peer.name, "error", cause)
    return Result(
        workload.name,
        peer.name,
        "ok",
        forward_ms=timing.forward_ms,
        backward_ms=timing.backward_ms,
        forward_tflops=workload.forward_flops / timing.forward_ms / 1e9,
        backward_tflops=workload.backward_flops / timing.backward_ms / 1e9,
        peak_bytes=timing.peak_bytes,
        forward_peak_bytes=timing.forward_peak_bytes,
        error_ratios=error_ratios,
    )


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
