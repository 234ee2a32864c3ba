"""Times a training step (forward and backward, no optimizer) of a 1B-class DiffLlama.

    python -m lctrain.recipes.differential.step --out step.json [--workloads mix32k,1x32k]

The step is compared with three others:

- the plain Llama of equal parameters, on lctrain's kernels;
- DiffLlama with two calls of lctrain's plain attention per layer;
- transformers' own DiffLlama, which cannot read packs. It is timed with three kinds of input.
  "batches": padded rows in the documents' order, with a mask and the model's own loss. "rows":
  padded rows of similar length without a mask, with lctrain's fused linear cross-entropy.
  "positions": one row of all documents, whose mask it makes from the position ids, with that
  cross-entropy, too.

All contenders have the same random tokens and bfloat16 weights, and run with and without full
activation checkpointing. Times are medians over steps, between synchronisations with the device.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.eval.runner import row_kwargs
from lctrain.loss import causal_lm_loss, token_losses
from lctrain.memory import use_policy
from lctrain.models import patch_model
from lctrain.recipes.differential.experiment import write_json
from lctrain.recipes.differential.shape import SHAPES, Shape, build_step_model
from lctrain_kernels.bench.__main__ import names_of, positive
from lctrain_kernels.bench.peers import installed_version
from lctrain_kernels.bench.run import new_record
from lctrain_kernels.bench.workloads import WORKLOADS

PLAIN, OURS = "plain", "v1"
WARMUP = 2
CHECKPOINTING = {"off": False, "on": True}
Step = Callable[[], None]


@dataclass(frozen=True)
class Contender:
    """One implementation of a training step.

    Attributes:
        name: Name in the results.
        version: Version of the attention: 0 is the plain Llama, 1 is DiffLlama, 2 is V2.
        attention: Name of the attention for `lctrain.patch_model`; None leaves the model unpatched.
        inputs: "pack"; "rows" of similar length, padded; "positions": one row, whose position ids
            restart at every document; or "batches" of padded rows, with a mask and labels.
        implementation: Name of the attention in transformers, before any patch.
    """

    name: str
    version: int
    attention: str | None
    inputs: str = "pack"
    implementation: str = "sdpa"


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(PLAIN, 0, "flash"),
        Contender(OURS, 1, "differential"),
        Contender("v1_two_calls", 1, "flash"),
        Contender("v2", 2, "differential"),
        Contender("transformers_as_it_comes", 1, None, "batches"),
        Contender("transformers_rows", 1, None, "rows"),
        Contender("transformers_positions", 1, None, "positions"),
        Contender("transformers_eager_rows", 1, None, "rows", "eager"),
    )
}


@dataclass(frozen=True)
class StepResult:
    """Result of one contender on one workload.

    Attributes:
        workload: Name of the workload.
        contender: Name of the contender.
        checkpointing: Whether the backward pass recomputes every layer.
        status: "ok", "out_of_memory" or "error".
        reason: Error message if the status is not "ok".
        inputs: Kind of input, as in Contender.
        parameters: Number of parameters of the model.
        tokens: Number of tokens per step, without padding.
        padded_tokens: Number of tokens per step, with padding.
        step_ms: Median time of a step, in milliseconds.
        all_step_ms: Times of all steps in order, in milliseconds.
        tokens_per_second: tokens / median time.
        peak_gib: Peak allocated memory of a step in GiB, weights and gradients included; None on a
            CPU.
    """

    workload: str
    contender: str
    checkpointing: bool
    status: str
    inputs: str
    tokens: int
    reason: str | None = None
    parameters: int | None = None
    padded_tokens: int | None = None
    step_ms: float | None = None
    all_step_ms: tuple[float, ...] = ()
    tokens_per_second: float | None = None
    peak_gib: float | None = None


def measure_step(
    contender: Contender,
    workload: str,
    lengths: Sequence[int],
    shape: Shape,
    *,
    checkpointing: bool,
    steps: int,
    device: torch.device,
) -> StepResult:
    """Times the steps of one contender; a failure is returned as a result."""
    known: dict[str, Any] = {
        "workload": workload,
        "contender": contender.name,
        "checkpointing": checkpointing,
        "inputs": contender.inputs,
        "tokens": sum(lengths),
    }
    try:
        found = _time_steps(contender, lengths, shape, checkpointing, steps, device)
    except torch.OutOfMemoryError as error:
        known |= {"status": "out_of_memory", "reason": str(error).splitlines()[0][:200]}
    except Exception as error:  # reported as a result; the other contenders are still timed
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        known |= {"status": "error", "reason": reason}
    else:
        known |= {"status": "ok", **found}
    _free(device)
    return StepResult(**known)


def _time_steps(
    contender: Contender,
    lengths: Sequence[int],
    shape: Shape,
    checkpointing: bool,
    steps: int,
    device: torch.device,
) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_step_model(shape, contender.version, contender.implementation, device, dtype)
    if checkpointing:
        use_policy(model, "checkpoint")
    patch = (
        nullcontext() if contender.attention is None else patch_model(model, contender.attention)
    )
    with patch:
        step, padded_tokens = make_step(contender.inputs, model, random_documents(lengths, shape))
        for _ in range(WARMUP):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = tuple(_milliseconds(step, device) for _ in range(steps))
    milliseconds = median(times)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "padded_tokens": padded_tokens,
        "step_ms": milliseconds,
        "all_step_ms": times,
        "tokens_per_second": sum(lengths) / milliseconds * 1000,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30
        if device.type == "cuda"
        else None,
    }


def random_documents(lengths: Sequence[int], shape: Shape) -> list[np.ndarray]:
    """Returns the same random token ids for every contender: [n] int64 each."""
    random = np.random.default_rng(0)
    return [random.integers(shape.vocab_size, size=length) for length in lengths]


def make_step(inputs: str, model: Any, documents: Sequence[np.ndarray]) -> tuple[Step, int]:
    """Returns a function that runs forward and backward, and its number of tokens with padding.

    Args:
        inputs: Kind of input, as in Contender.
        model: A causal LM; its gradients are reset before every step.
        documents: Token ids, [n] int64 each.
    """
    device = next(model.parameters()).device
    targets = sum(len(document) - 1 for document in documents)
    batch = PackedBatch.from_documents(documents).to(device)
    if inputs == "pack":

        def pack_step() -> None:
            model.zero_grad(set_to_none=True)
            loss, _ = causal_lm_loss(model, batch)
            (loss / targets).backward()

        return pack_step, batch.num_tokens
    if inputs == "batches":
        batches = list(padded_batches(documents, device))

        def batch_step() -> None:
            model.zero_grad(set_to_none=True)
            for kwargs, count in batches:
                (model(**kwargs).loss * (count / targets)).backward()

        return batch_step, sum(kwargs["input_ids"].numel() for kwargs, _ in batches)
    if inputs == "positions":
        kwargs = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }
        labels = batch.labels.flatten()
        places = (labels != IGNORE_INDEX).nonzero().flatten()
        parts = [(kwargs, places, labels[places])]
        padded = batch.num_tokens
    else:
        rows = list(similar_rows(documents, sum(map(len, documents))))
        parts = [_row_part(row, device) for row in rows]
        padded = sum(len(row) * max(map(len, row)) for row in rows)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        for kwargs, places, wanted in parts:
            loss = token_losses(model, kwargs, places, wanted).sum()
            (loss / targets).backward()

    return step, padded


def padded_batches(
    documents: Sequence[np.ndarray], device: torch.device
) -> Iterator[tuple[dict[str, Any], int]]:
    """Batches documents as a data loader does: in their order, padded to the batch's longest.

    A batch has as many documents as fit into the pack's tokens if all were as long as the longest.

    Yields:
        Arguments of the model, and the number of targets over which its loss is the mean.
    """
    rows = max(1, sum(map(len, documents)) // max(map(len, documents)))
    for start in range(0, len(documents), rows):
        batch = documents[start : start + rows]
        kwargs = row_kwargs(batch, max(map(len, batch)), device)
        mask = torch.zeros_like(kwargs["input_ids"])
        for row, document in zip(mask, batch, strict=True):
            row[: len(document)] = 1
        kwargs |= {
            "attention_mask": mask,
            "labels": kwargs["input_ids"].masked_fill(mask == 0, IGNORE_INDEX),
        }
        yield kwargs, sum(len(document) - 1 for document in batch)


def similar_rows(
    documents: Sequence[np.ndarray], max_tokens: int
) -> Iterator[Sequence[np.ndarray]]:
    """Yields batches of documents of similar length, longest first, of at most `max_tokens`."""
    ordered = sorted(documents, key=len, reverse=True)
    while ordered:
        rows = max(1, max_tokens // len(ordered[0]))
        yield ordered[:rows]
        ordered = ordered[rows:]


def _row_part(documents: Sequence[np.ndarray], device: torch.device) -> tuple[Any, Any, Any]:
    """Returns the model's arguments, the positions of predictions [n], and the targets [n]."""
    width = max(map(len, documents))
    places = [row * width + np.arange(len(d) - 1) for row, d in enumerate(documents)]
    wanted = [document[1:] for document in documents]
    return (
        row_kwargs(documents, width, device),
        torch.from_numpy(np.concatenate(places)).to(device),
        torch.from_numpy(np.concatenate(wanted)).to(device),
    )


def _milliseconds(step: Step, device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    step()
    _wait(device)
    return (time.perf_counter() - begin) * 1000


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(result: StepResult, others: Sequence[StepResult]) -> str:
    """Returns a line for the terminal: time, memory, and ratios to the plain model and to `v1`."""
    head = (
        f"{result.workload:8s} {'ckpt' if result.checkpointing else '    '} {result.contender:24s}"
    )
    if result.step_ms is None:
        return f"{head} {result.status}: {result.reason}"
    memory = "" if result.peak_gib is None else f" {result.peak_gib:6.1f} GiB"
    line = f"{head} {result.step_ms:9.1f} ms {result.tokens_per_second:9,.0f} tokens/s{memory}"
    for name in (PLAIN, OURS):
        for other in others:
            same = (other.workload, other.checkpointing) == (result.workload, result.checkpointing)
            if same and other.contender == name != result.contender and other.step_ms:
                line += f"   {result.step_ms / other.step_ms:.3f}x the time of {name}"
    return line


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, and writes the results so far after every contender."""
    parser = argparse.ArgumentParser(
        prog="python -m lctrain.recipes.differential.step", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument(
        "--workloads", type=names_of(WORKLOADS, "workloads"), default=["mix32k", "1x32k"]
    )
    parser.add_argument(
        "--contenders", type=names_of(CONTENDERS, "contenders"), default=list(CONTENDERS)
    )
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument(
        "--checkpointing", type=names_of(CHECKPOINTING, "checkpointing"), default=["off", "on"]
    )
    parser.add_argument("--steps", type=positive, default=7, help="timed; their median counts")
    parser.add_argument(
        "--max-length", type=positive, help="cut the workloads' documents, to try it on a CPU"
    )
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    header = new_record([], device, options.steps, 0)
    shape = SHAPES[options.shape]
    results: list[StepResult] = []
    for checkpointing in options.checkpointing:
        for workload in options.workloads:
            lengths = [
                min(length, options.max_length or length) for length in WORKLOADS[workload].lengths
            ]
            for name in options.contenders:
                result = measure_step(
                    CONTENDERS[name],
                    workload,
                    lengths,
                    shape,
                    checkpointing=CHECKPOINTING[checkpointing],
                    steps=options.steps,
                    device=device,
                )
                results.append(result)
                print(describe(result, results), flush=True)
                write_json(
                    options.out,
                    {
                        "device": header.device,
                        "date": header.date,
                        "versions": {
                            **header.versions,
                            "transformers": installed_version("transformers"),
                            "lctrain": installed_version("lctrain"),
                        },
                        "settings": {
                            "shape": {"name": options.shape, **asdict(shape)},
                            "dtype": "bfloat16" if device.type == "cuda" else "float32",
                            "steps": options.steps,
                            "warmup_steps": WARMUP,
                            "max_length": options.max_length,
                        },
                        "workloads": {
                            name: list(WORKLOADS[name].lengths) for name in options.workloads
                        },
                        "results": [asdict(result) for result in results],
                    },
                )
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
