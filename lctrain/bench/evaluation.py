"""`lctrain-bench evaluation`: times evaluation tasks beside the forward passes that they need.

    lctrain-bench evaluation --output evaluation.json
    lctrain-bench evaluation --tiny --output evaluation.json

Parts, in this order:

- `perplexity`: tokens per second of the task at each length, beside plain forward passes with the
  fused loss over the same documents.
- `answers`: seconds of passkeys and of RULER's tasks at one length, beside forward passes over as
  many documents of that length without logits.
- `generated`: the same of passkeys that a small model answers by generation, at several lengths.
- `document`: seconds and memory of the task perplexity on one document of a million tokens.
- `suite`: seconds of passkeys, RULER's tasks and perplexity by `lctrain-eval` with a stored model,
  from loading it to its report, for a 1B model and for one of SmolLM2's shape.

The weights are random, so that every answer has its full length. The record is saved after every
result. With fewer --suite-documents or --suite-items the time of the whole suite is projected.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lctrain.bench.evaluation_runs import (
    BY_GENERATION,
    Sizes,
    time_answers,
    time_document,
    time_perplexity,
    time_suite,
)
from lctrain.bench.shapes import SHAPES, ModelShape, build_shape, llama_135m, tiny
from lctrain.models import patch_model
from lctrain_kernels.bench.__main__ import names_of, positive
from lctrain_kernels.bench.evaluation_report import PARTS, evaluation_lines
from lctrain_kernels.bench.peers import installed_version
from lctrain_kernels.bench.run import new_record
from lctrain_kernels.strict_json import write_json

Row = dict[str, Any]


def runs(
    sizes: Sizes, parts: Sequence[str], folder: Path, on_cpu: bool
) -> Iterator[tuple[str, Row, Callable[[], Row]]]:
    """Yields the part of every run, what it measures, and a function that measures it.

    Args:
        sizes: Sizes of the runs.
        parts: Names of the parts to run.
        folder: Folder for models and texts of the suite.
        on_cpu: Whether to run tiny models on a CPU.
    """
    device = torch.device("cpu" if on_cpu else "cuda")
    dtype = torch.float32 if on_cpu else torch.bfloat16
    shapes = [SHAPES["llama-1b"], llama_135m]
    if on_cpu:
        shapes = [tiny(shape, sizes.vocab_size) for shape in shapes]
    large, small = shapes
    asked = [
        ("answers", large, ["passkey", "ruler"], (sizes.answered,)),
        ("generated", small, [BY_GENERATION], sizes.generated),
    ]
    if "perplexity" in parts:
        with _patched(large, device, dtype) as model:
            for length in sizes.lengths:
                about = {"shape": large.title, "length": length}
                yield "perplexity", about, partial(time_perplexity, model, length, sizes)
    for part, shape, tasks, contexts in asked:
        if part in parts:
            with _patched(shape, device, dtype) as model:
                for task in tasks:
                    about = {"shape": shape.title, "task": task}
                    yield part, about, partial(time_answers, model, task, contexts, sizes)
    if "document" in parts:
        with _patched(large, device, dtype) as model:
            about = {"shape": large.title, "task": "perplexity"}
            yield "document", about, partial(time_document, model, sizes)
    if "suite" in parts:
        for shape, lengths in zip(shapes, sizes.suite_lengths, strict=False):
            for task in ("passkey", "ruler", "perplexity"):
                about = {"shape": shape.title, "task": task, "lengths": list(lengths)}
                yield (
                    "suite",
                    about,
                    partial(time_suite, shape, task, lengths, sizes, folder, device, dtype),
                )


@contextmanager
def _patched(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Iterator[Any]:
    """Context manager of a patched model in eval mode with random weights."""
    model = build_shape(shape, "sdpa", device, dtype).eval()
    with patch_model(model):
        yield model


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts",
        type=names_of(dict.fromkeys(PARTS), "parts"),
        default=PARTS,
        help=f"separated by commas; default: {','.join(PARTS)}",
    )
    parser.add_argument(
        "--seconds", type=positive, default=500, help="no run begins later; default 500"
    )
    parser.add_argument(
        "--most-tokens",
        type=positive,
        default=8_388_608,
        help="most tokens of the documents of a length; fewer documents hold them",
    )
    parser.add_argument(
        "--rounds", type=positive, help="timed rounds of plain forward passes; default 2"
    )
    parser.add_argument(
        "--suite-documents", type=positive, help="documents of the suite's perplexity; default 32"
    )
    parser.add_argument(
        "--suite-items", type=positive, help="prompts of a RULER task in the suite; default 10"
    )
    parser.add_argument("--tiny", action="store_true", help="models that a CPU runs in seconds")
    parser.add_argument("--output", type=Path, default=Path("evaluation.json"), help="JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Returns 2 if the machine cannot run it, 1 if a run failed."""
    options = parse_arguments(arguments)
    on_gpu = torch.cuda.is_available() and not options.tiny
    if not (options.tiny or on_gpu):
        print(
            "lctrain-bench evaluation needs a GPU, and torch sees none. Try it with --tiny.",
            file=sys.stderr,
        )
        return 2
    header = new_record([], torch.device("cuda" if on_gpu else "cpu"), 1, 0)
    record: dict[str, Any] = {
        "device": header.device,
        "date": header.date,
        "versions": {**header.versions, "transformers": installed_version("transformers")},
        **{part: [] for part in PARTS},
    }
    sizes = Sizes.tiny() if options.tiny else Sizes(most_tokens=options.most_tokens)
    given = {name: getattr(options, name) for name in ("rounds", "suite_documents", "suite_items")}
    sizes = replace(sizes, **{name: value for name, value in given.items() if value is not None})
    start, failed = time.perf_counter(), False
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for part, about, run in runs(sizes, options.parts, Path(folder), not on_gpu):
            spent = time.perf_counter() - start
            if spent > options.seconds:
                result: Row = {"error": f"not run after {spent:.0f} s"}
            else:
                try:
                    result = run()
                except Exception as error:  # the other runs have their turn
                    traceback.print_exc()
                    result, failed = {"error": f"{type(error).__name__}: {error}"[:400]}, True
            record[part].append({**about, **result})
            write_json(options.output, record, indent=1)
            print(f"{part}: {record[part][-1]}", flush=True)
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
    print("\n".join(evaluation_lines(record)))
    print(f"Wrote {options.output}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
