"""`lctrain-bench sft`: times supervised fine-tuning beside TRL's SFTTrainer, on one GPU.

    lctrain-bench sft --output sft.json
    lctrain-bench sft --tiny --contenders lctrain,trl_packed --output sft.json

Every contender trains all weights of the same model on conversations of random tokens, whose
answers are trained on. "Trained tokens per second" counts these tokens, from the end of the warm-up
to the end of the last step, with loading and AdamW. Each contender has a process of its own,
because Liger patches transformers for the whole process. Without a GPU, SDPA takes the place of
FlashAttention-4, and there is no Liger. The record is written after every contender.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lctrain.bench.sft_process import SFT_CONTENDERS, SftJob
from lctrain.bench.shapes import SHAPES, tiny
from lctrain.bench.step import StepProcess
from lctrain_kernels.bench.__main__ import names_of, positive
from lctrain_kernels.bench.peers import installed_version
from lctrain_kernels.bench.run import new_record
from lctrain_kernels.bench.sft_report import sft_table
from lctrain_kernels.strict_json import to_json, write_json

PROCESS = "lctrain.bench.sft_process"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench sft",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Contenders:\n"
        + "\n".join(f"  {name:12s} {c.title}" for name, c in SFT_CONTENDERS.items()),
    )
    job = SftJob("qwen3-1.7b")
    parser.add_argument("--shape", choices=list(SHAPES), default=job.shape)
    parser.add_argument(
        "--contenders",
        type=names_of(SFT_CONTENDERS, "contenders"),
        default=list(SFT_CONTENDERS),
        help="default: all",
    )
    parser.add_argument(
        "--row-tokens", type=positive, default=job.row_tokens, help="tokens of a packed row"
    )
    parser.add_argument(
        "--mean-tokens", type=positive, default=job.mean_tokens, help="mean of a conversation"
    )
    parser.add_argument(
        "--rows", type=positive, default=job.rows, help="conversations in a batch with padding"
    )
    parser.add_argument("--steps", type=positive, default=job.steps, help="timed steps")
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU trains in seconds")
    parser.add_argument("--output", type=Path, default=Path("sft.json"), help="JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Returns 1 if a contender failed, 2 if the machine cannot run it."""
    options = parse_arguments(arguments)
    on_gpu = torch.cuda.is_available()
    if not (options.tiny or on_gpu):
        print(
            "lctrain-bench sft needs a GPU, and torch sees none. Try it with --tiny.",
            file=sys.stderr,
        )
        return 2
    job = SftJob(
        options.shape,
        options.row_tokens,
        options.mean_tokens,
        options.rows,
        options.steps,
        options.tiny,
    )
    header = new_record([], torch.device("cuda" if on_gpu else "cpu"), 1, 0)
    shape = SHAPES[options.shape]
    record: dict[str, Any] = {
        "device": header.device,
        "date": header.date,
        "versions": {**header.versions, "transformers": installed_version("transformers")},
        "shape": (tiny(shape) if options.tiny else shape).title,
        "settings": asdict(job),
        "runs": [],
    }
    processes = {name: StepProcess(name, PROCESS) for name in options.contenders}
    try:
        for process in processes.values():
            process.start()  # all import their libraries at the same time
        for name, process in processes.items():
            result = process.measure(job)
            process.close()  # its model leaves the GPU
            record["versions"] |= process.versions
            record["runs"].append(
                {"contender": name, "title": SFT_CONTENDERS[name].title, **result}
            )
            print(to_json(record["runs"][-1]), flush=True)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.output, record, indent=1)
    finally:
        for process in processes.values():
            process.close()
    print(sft_table(record))
    print(f"Wrote {options.output}")
    return int(any(run["status"] != "ok" for run in record["runs"]))


if __name__ == "__main__":
    sys.exit(main())
