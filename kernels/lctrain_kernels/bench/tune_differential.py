"""Times tile configurations of differential attention, as tune.py does those of plain attention:

python -m lctrain_kernels.bench.tune_differential --output rows.json
"""

import argparse
import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from lctrain_kernels import make_schedule
from lctrain_kernels.bench.differential import (
    DIFFERENTIAL_WORKLOADS,
    DifferentialWorkload,
    make_inputs,
)
from lctrain_kernels.bench.tune import parse_config
from lctrain_kernels.differential.triton_bwd import differential_bwd
from lctrain_kernels.differential.triton_fwd import differential_fwd
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import TiledPack
from lctrain_kernels.tile.config import override_configs

# By version; none of them makes ptxas serialise the products (sm_90, Triton 3.6.0).
CANDIDATES = {
    "diff_fwd": {
        1: "128,64,8,3 128,64,8,2 64,64,4,3 64,64,4,2 128,32,8,3 64,32,4,3",
        2: "128,64,8,3,2 128,64,8,2,2 128,64,8,3,1 64,64,4,2,2 64,64,4,2,1 128,32,8,3,2 "
        "64,32,4,3,2",
    },
    "diff_dq": {
        1: "64,64,4,2 128,64,8,2 64,32,4,3 64,32,4,2 128,32,8,3",
        2: "128,32,8,2,2 128,32,8,3,2 128,64,8,2,2 128,32,8,2,1 64,32,4,2,2 64,32,4,3,2",
    },
    "diff_dkv": {
        1: "32,128,8,2 32,128,8,3 32,64,4,2 32,64,4,3 64,64,8,2 64,128,8,2",
        2: "32,128,8,2 32,128,8,3 32,64,4,2 64,128,8,2 64,64,8,2",
    },
}


class _Case:
    """The tensors of a workload and the call that runs one operation on them."""

    def __init__(self, workload: DifferentialWorkload, dropout_p: float) -> None:
        inputs = make_inputs(workload, "cuda")
        q1, q2, k1, k2 = (x.detach() for x in inputs.branches())
        lam = inputs.lam.detach().float().expand(q1.shape[:2])
        shared = workload.version == 2
        self.schedule = make_schedule(workload.lengths).to("cuda")
        self.dout = inputs.grad_out
        self.cu = inputs.cu_seqlens
        self.operands = (q1, q2, k1, None if shared else k2, inputs.v.detach(), lam)
        self.pack = TiledPack(self.cu, self.cu, self.schedule.q_tiles, self.schedule.k_tiles)
        self.options = AttentionOptions(
            softmax_scale=workload.head_dim**-0.5,
            window_right=0,
            dropout_p=dropout_p,
            dropout_seed=torch.full((1,), 7, device="cuda") if dropout_p else None,
        )
        _, *self.saved = self.forward()

    def forward(self) -> tuple[Tensor, ...]:
        return differential_fwd(*self.operands, self.pack, self.options)

    def backward(self) -> tuple[Tensor, ...]:
        out1, out2, lse1, lse2 = self.saved
        saved = (out1, out2, lse1, lse2)
        grads = differential_bwd(
            self.dout, None, None, *self.operands, *saved, self.pack, self.options
        )
        return tuple(x for x in grads if x.numel())

    def run(self, operation: str) -> tuple[Tensor, ...]:
        return self.forward() if operation == "diff_fwd" else self.backward()


def _precompile(job: tuple[str, str, DifferentialWorkload, float]) -> None:
    operation, candidate, workload, dropout_p = job
    try:
        case = _Case(replace(workload, lengths=(300, 20)), dropout_p)
        with override_configs(**{operation: parse_config(candidate)}):
            case.run(operation)
        torch.cuda.synchronize()
    except Exception as error:  # reported again, with its message, when it is timed
        print(f"precompile {operation} {candidate}: {type(error).__name__}", flush=True)


def time_candidates(
    workload: DifferentialWorkload, operation: str, candidates: list[str], dropout_p: float
) -> list[dict]:
    """Times each candidate on one workload; the backward's other kernel stays as in the table.

    Args:
        workload: Workload to time.
        operation: "diff_fwd", "diff_dq" or "diff_dkv".
        candidates: Texts for parse_config.
        dropout_p: Dropout probability.

    Returns:
        A row per candidate: workload, operation, config, ms (None where it failed), error or None.
    """
    case = _Case(workload, dropout_p)
    expected = [x.float() for x in case.run(operation)]
    rows = []
    for candidate in candidates:
        row: dict[str, Any] = {"workload": workload.name, "operation": operation}
        row |= {"config": candidate, "dropout_p": dropout_p, "ms": None, "error": None}
        try:
            with override_configs(**{operation: parse_config(candidate)}):
                pairs = zip(case.run(operation), expected, strict=True)
                difference = max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)
                if not difference < 1e-2:
                    raise ValueError(f"result differs from the table's by {difference:.1e}")
                row["ms"] = do_bench(
                    lambda: case.run(operation), warmup=20, rep=80, return_mode="median"
                )
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:120]
        rows.append(row)
        speed = f"{row['ms']:8.3f} ms" if row["ms"] else row["error"]
        print(f"{workload.name:10} {operation:8} p={dropout_p} {candidate:16} {speed}", flush=True)
    return rows


def main() -> None:
    """Command line: --operations, --workloads, --dropout, --candidates, --output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", default=",".join(CANDIDATES))
    parser.add_argument("--workloads", default="v1_1x32k,v1_mix32k,v2_1x32k,v2_mix32k")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--candidates", help="space-separated, instead of the built-in list")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    workloads = [DIFFERENTIAL_WORKLOADS[name] for name in arguments.workloads.split(",")]
    operations = arguments.operations.split(",")

    def candidates(operation: str, workload: DifferentialWorkload) -> list[str]:
        return (arguments.candidates or CANDIDATES[operation][workload.version]).split()

    by_version = {workload.version: workload for workload in workloads}.values()
    jobs = [
        (operation, candidate, workload, arguments.dropout)
        for operation, workload in itertools.product(operations, by_version)
        for candidate in candidates(operation, workload)
    ]
    workers = min(12, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(_precompile, jobs))
    rows = []
    for operation, workload in itertools.product(operations, workloads):
        rows += time_candidates(
            workload, operation, candidates(operation, workload), arguments.dropout
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
