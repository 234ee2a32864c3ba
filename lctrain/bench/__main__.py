"""`lctrain-bench`: measures lctrain beside other libraries.

    lctrain-bench --check --workloads 1x32k,mix32k --peers lctrain,fa2
    lctrain-bench step --shapes llama-1b

Without the name of a benchmark, it times attention.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "attention": ("lctrain_kernels.bench.__main__", "packed attention (the default)"),
    "ops": ("lctrain_kernels.bench.operations", "linear cross-entropy and fused operations"),
    "decode": ("lctrain_kernels.bench.decode", "attention over key/value caches"),
    "step": ("lctrain.bench.step", "whole training steps, one process per contender"),
    "memory": ("lctrain.bench.memory", "peak memory and speed against context length"),
    "longest": ("lctrain.bench.longest", "longest context that fits, from a laptop to one H200"),
    "curves": ("lctrain.bench.curves", "loss curves with everything on and with everything off"),
    "generation": ("lctrain.bench.generation", "greedy completions, on one GPU"),
    "evaluation": ("lctrain.bench.evaluation", "evaluation tasks beside their forward passes"),
    "groups": ("lctrain.bench.groups", "prompts that completions share, on one GPU"),
    "chat": ("lctrain.bench.chat", "tokenizing and masking conversations, on a CPU"),
    "sft": ("lctrain.bench.sft", "supervised fine-tuning beside TRL, on one GPU"),
    "detached": ("lctrain.bench.detached", "gradients of a shared prompt, on a CPU"),
    "scale": ("lctrain.bench.scale", "training steps and shared attention on several GPUs"),
    "shares": ("lctrain.bench.shares", "shares of a document and sharded steps, on one GPU"),
    "encoder": ("lctrain.bench.encoder", "encoders on padded rows, beside padded peers"),
    "cost": ("lctrain.bench.cost", "computes how training scales to 1,024 GPUs"),
    "balance": ("lctrain.bench.balance", "balance of attention work over ranks, on a CPU"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark that the first argument names, with the other arguments."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in (["--help"], ["-h"]):
        print("usage: lctrain-bench [BENCHMARK] [options]; lctrain-bench BENCHMARK --help\n")
        print("\n".join(f"  {name:10s} {words}" for name, (_, words) in BENCHMARKS.items()))
        return 0
    name = "attention"
    if given and not given[0].startswith("-"):
        name, *given = given
    if name not in BENCHMARKS:
        print(
            f"lctrain-bench: the benchmark must be one of {', '.join(BENCHMARKS)}, got {name!r}. "
            "Options begin with --.",
            file=sys.stderr,
        )
        return 2
    return importlib.import_module(BENCHMARKS[name][0]).main(given)


if __name__ == "__main__":
    sys.exit(main())
