"""Times the training step of one contender, in a process of its own.

    python -m lctrain.bench.step_process CONTENDER

The process reads one job per line from its standard input, as JSON, and writes one line of results
per job. The first line that it writes holds the contender's versions, or the reason why it cannot
run. Between two jobs it holds no model, so that other contenders can use the GPU.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from lctrain.batch import PackedBatch
from lctrain.bench.contenders import CONTENDERS, Contender
from lctrain.bench.shapes import SHAPES, ModelShape, tiny
from lctrain.bench.step_profile import profile_step
from lctrain.flops import FlopCounter, peak_flops
from lctrain.memory import use_policy

WARMUP = 2
CHECKPOINTING = ("none", "full", "kept")


@dataclass(frozen=True)
class Job:
    """Settings of one measurement.

    Attributes:
        shape: Name of the model's shape.
        lengths: Number of tokens of each document of the pack.
        checkpointing: "none", "full" (of every layer), or "kept" (of every layer, but attention
            outputs are kept).
        optimizer: True if a step updates the weights, by fused AdamW.
        steps: Number of timed steps.
        mixed: Documents of further packs of other lengths, one pack per untimed step. They show
            whether the memory allocator handles changing lengths.
        profile: True if one further step is profiled.
        tiny: True for a model of a few thousand parameters.
    """

    shape: str
    lengths: Sequence[int]
    checkpointing: str = "none"
    optimizer: bool = False
    steps: int = 5
    mixed: Sequence[Sequence[int]] = field(default_factory=tuple)
    profile: bool = False
    tiny: bool = False


def measure(contender: Contender, job: Job, device: torch.device) -> dict[str, Any]:
    """Builds the contender's model and measures its steps.

    Args:
        contender: Contender to measure.
        job: Settings of the measurement.
        device: Device of the model.

    Returns:
        A dictionary with "status", and either "reason" or the figures: step_ms of every step,
        host_ms, loss, parameters, flops of a step, and on a GPU peak_gib, reserved_gib and
        allocator_retries.
    """
    try:
        return {"status": "ok", **_measure(contender, job, device)}
    except torch.OutOfMemoryError as error:
        return {"status": "out_of_memory", "reason": str(error).splitlines()[0][:200]}
    except Exception as error:  # reported as a result; the parent measures the others
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return {"status": "error", "reason": reason}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(contender: Contender, job: Job, device: torch.device) -> dict[str, Any]:
    shape = tiny(SHAPES[job.shape]) if job.tiny else SHAPES[job.shape]
    on_gpu = device.type == "cuda"
    model = contender.build(shape, device, torch.bfloat16 if on_gpu else torch.float32)
    if job.checkpointing != "none":
        kept = model.config.num_hidden_layers if job.checkpointing == "kept" else 0
        use_policy(model, "checkpoint", keep_attention=kept)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def make_step(lengths: Sequence[int], seed: int = 0) -> Callable[[], torch.Tensor]:
        batch = random_pack(lengths, shape, seed).to(device)
        arguments = contender.arguments(batch)

        def step() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = model(**arguments).loss
            loss.backward()
            if job.optimizer:
                optimizer.step()
            return loss.detach()

        return step

    step = make_step(job.lengths)
    loss = float(step())
    for _ in range(WARMUP - 1):
        step()
    before = _retries(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    timed = [time_step(step, device) for _ in range(job.steps)]
    found: dict[str, Any] = {
        "step_ms": [round(milliseconds, 3) for milliseconds, _ in timed],
        "host_ms": round(median(host for _, host in timed), 3),
        "loss": round(loss, 4),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": FlopCounter.of(model).step_flops(job.lengths),
        "peak_flops": peak_flops(torch.cuda.get_device_name(device)) if on_gpu else None,
        "peak_gib": None,
    }
    if on_gpu:
        found["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / 2**30, 2)
    for number, lengths in enumerate(job.mixed):
        make_step(lengths, number + 1)()
    if on_gpu:
        found["allocator_retries"] = _retries(device) - before
    if job.profile:
        found["profile"] = profile_step(step, device)
    return found


def random_pack(lengths: Sequence[int], shape: ModelShape, seed: int = 0) -> PackedBatch:
    """Returns a pack of random tokens, the same one for every contender."""
    generator = torch.Generator().manual_seed(seed)
    return PackedBatch.from_documents(
        [torch.randint(shape.vocab_size, (length,), generator=generator) for length in lengths]
    )


def time_step(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Returns the milliseconds of a step, and those until the host has launched its last kernel.

    The device is idle when the step begins.
    """
    _wait(device)
    begin = time.perf_counter()
    step()
    issued = time.perf_counter()
    _wait(device)
    return (time.perf_counter() - begin) * 1000, (issued - begin) * 1000


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _retries(device: torch.device) -> int:
    """Returns how often the allocator has freed its cache to find memory."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


def answer_jobs(
    contender: Any, measure_job: Callable[[dict[str, Any], torch.device], dict[str, Any]]
) -> None:
    """Answers jobs until the standard input ends.

    Args:
        contender: Contender of this process, with the methods `missing` and `versions`.
        measure_job: Function from the fields of a job and the device to the results.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Libraries print to the standard output, so the answers get its file and it becomes an alias of
    # the standard error.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def answer(content: dict[str, Any]) -> None:
            answers.write(json.dumps(content) + "\n")
            answers.flush()

        answer({"missing": contender.missing(device), "versions": contender.versions()})
        for line in sys.stdin:
            answer(measure_job(json.loads(line), device))


def main(arguments: Sequence[str] | None = None) -> None:
    """Answers jobs until the standard input ends."""
    (name,) = sys.argv[1:] if arguments is None else arguments
    contender = CONTENDERS[name]
    answer_jobs(contender, lambda fields, device: measure(contender, Job(**fields), device))


if __name__ == "__main__":
    main()
