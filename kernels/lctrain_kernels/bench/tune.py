"""Times tile configurations against each other: python -m lctrain_kernels.bench.tune --help.

Candidates are compiled side by side first (one process per core), then timed one by one on one GPU.
A candidate that does not compile, does not fit or gives another result than the table's
configuration is reported and left out.
"""

import argparse
import contextlib
import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from lctrain_kernels import make_schedule
from lctrain_kernels.bench.dual_chunk import CHUNK_SIZE, LOCAL_SIZE, frequencies
from lctrain_kernels.bench.workloads import WORKLOADS, Workload
from lctrain_kernels.dual_chunk.operands import Operands, Rotation
from lctrain_kernels.dual_chunk.reference import DualChunkGeometry
from lctrain_kernels.dual_chunk.triton_bwd import dual_chunk_bwd
from lctrain_kernels.dual_chunk.triton_fwd import dual_chunk_fwd
from lctrain_kernels.gluon.config import BackwardTile, ForwardTile, override_tiles
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import TiledPack
from lctrain_kernels.tile.config import TileConfig, override_configs
from lctrain_kernels.varlen import hopper
from lctrain_kernels.varlen.triton_bwd import varlen_bwd
from lctrain_kernels.varlen.triton_fwd import varlen_fwd

_FORWARD = {
    64: "64,64,4,3,2 128,64,4,3,2 128,64,8,3,2,128 128,128,8,2,2,128 64,64,4,2,2,128",
    96: "128,64,8,3,2 128,64,8,2,2 64,64,4,2,2",
    128: "128,64,8,3,2 128,64,8,3,4 128,64,8,2,2 128,128,8,2,2 64,64,4,3,2 128,32,4,3,2",
    256: "128,64,8,2,2 128,32,8,2,2 128,64,8,1,2 64,64,4,2,2 64,32,4,2,2 128,64,8,2,4",
}
_DQ = {
    64: "64,64,4,3,2 128,64,4,3,2 64,128,4,2,2 128,64,8,2,2,128",
    96: "64,64,4,2,2 128,64,8,2,2",
    128: "64,64,4,2,2 128,64,8,2,2 64,32,4,3,2 128,64,8,2,4 128,32,8,3,2",
    256: "64,32,4,2,2 128,32,8,2,2 64,64,8,2,2 64,32,8,2,2 64,64,8,1,2 128,32,8,1,2",
}
_DKV = {
    64: "64,64,4,3 64,64,4,2 64,128,8,2 128,64,4,2 32,64,4,3",
    96: "64,128,8,2 32,128,8,2 32,64,4,2",
    128: "64,128,8,2 64,128,8,3 32,128,8,2 64,64,4,2 32,64,4,2",
    256: "32,64,8,1 32,64,8,2 64,64,8,1 32,64,4,1 32,128,8,1 16,64,4,2",
}
_DUAL_CHUNK_FORWARD = {
    64: "64,64,4,3,2 128,64,4,3,2 64,64,4,2,2 128,64,8,3,2",
    96: "128,64,8,3,2 128,64,8,2,2",
    128: "128,64,8,3,2 128,64,8,3,4 128,64,8,2,2 64,64,4,3,2 128,32,8,3,2",
    256: "64,64,8,2,2 64,64,8,2,4 64,32,8,2,2",
}
_DUAL_CHUNK_DQ = {
    64: "64,64,4,3,2 64,64,4,2,2 128,64,8,2,2",
    96: "128,64,8,2,4 128,32,8,3,4",
    128: "128,64,8,2,4 128,64,8,2,2 64,64,4,2,2 128,32,8,3,4 64,32,4,3,2",
    256: "64,32,8,2,2 64,32,8,2,4 64,64,8,1,4",
}
_DUAL_CHUNK_DKV = {
    64: "64,64,4,3 64,64,4,2 64,64,8,2 32,64,4,3",
    96: "64,128,8,2 32,128,8,2",
    128: "64,128,8,2 64,64,8,2 32,128,8,2 32,64,4,2",
    256: "32,64,8,1 32,64,8,2",
}
# Block of keys, stages of keys and values, stages of queries, warpgroups, whether warps meet early.
_HOPPER_FORWARD = {
    64: "64,4,2,3,0 64,4,2,3,1 128,3,2,3,0 128,3,2,3,1 128,3,2,2,0 128,3,2,2,1",
    96: "128,2,2,2,0 128,2,2,2,1 64,4,2,2,0",
    128: "128,2,2,2,0 128,2,2,2,1 64,4,2,2,0",
    256: "64,2,1,2,0 64,2,1,2,1",
}
# Block of queries, stages, whether dq is added from registers.
_HOPPER_BACKWARD = {
    64: "64,4,1 64,3,1 64,3,0",
    96: "64,2,0 64,4,1",
    128: "64,2,0 64,4,1",
}
_CANDIDATES = {
    "varlen_fwd": _FORWARD,
    "varlen_dq": _DQ,
    "varlen_dkv": _DKV,
    "dual_chunk_fwd": _DUAL_CHUNK_FORWARD,
    "dual_chunk_dq": _DUAL_CHUNK_DQ,
    "dual_chunk_dq_partial": _DUAL_CHUNK_DQ,
    "dual_chunk_dkv": _DUAL_CHUNK_DKV,
    "dual_chunk_dkv_partial": _DUAL_CHUNK_DKV,
    "hopper_fwd": _HOPPER_FORWARD,
    "hopper_bwd": _HOPPER_BACKWARD,
}


def parse_config(text: str) -> TileConfig:
    """Reads block_m,block_n,num_warps,num_stages[,pack[,max_registers]]."""
    block_m, block_n, num_warps, num_stages, *rest = (int(part) for part in text.split(","))
    pack = rest[0] if rest else 1
    max_registers = rest[1] if len(rest) > 1 else None
    return TileConfig(block_m, block_n, num_warps, num_stages, pack, max_registers)


def override(operation: str, candidate: str) -> contextlib.AbstractContextManager[None]:
    """Forces the configuration of an operation."""
    if not operation.startswith("hopper"):
        return override_configs(**{operation: parse_config(candidate)})
    first, second, *rest = (int(part) for part in candidate.split(","))
    if operation == "hopper_fwd":
        q_stages, consumers, early = rest
        tile = ForwardTile(first, second, q_stages, consumers, bool(early))
        return override_tiles(forward=tile)
    return override_tiles(backward=BackwardTile(first, second, *map(bool, rest)))


class _Case:
    """The tensors of a workload and the calls of the operation's kernels on them."""

    def __init__(self, workload: Workload, dropout_p: float, operation: str) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(heads: int) -> torch.Tensor:
            shape = (workload.tokens, heads, workload.head_dim)
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

        self.q, self.dout = draw(workload.heads), draw(workload.heads)
        self.k, self.v = draw(workload.heads_kv), draw(workload.heads_kv)
        lengths = torch.tensor((0, *workload.lengths))
        self.cu = lengths.cumsum(0).to(device="cuda", dtype=torch.int32)
        self.schedule = make_schedule(workload.lengths).to("cuda")
        self.pack = TiledPack(self.cu, self.cu, self.schedule.q_tiles, self.schedule.k_tiles)
        self.options = AttentionOptions(
            softmax_scale=workload.head_dim**-0.5,
            window_right=0,
            dropout_p=dropout_p,
            dropout_seed=torch.full((1,), 7, device="cuda") if dropout_p else None,
        )
        self.dual_chunk = operation.startswith("dual_chunk")
        self.hopper = operation.startswith("hopper")
        if self.dual_chunk:
            geometry = DualChunkGeometry(CHUNK_SIZE, LOCAL_SIZE)
            inv_freq = frequencies(workload.head_dim, self.q.device)
            self.operands = Operands(self.q, self.k, self.v, inv_freq, None, CHUNK_SIZE, LOCAL_SIZE)
            self.rotation = Rotation(
                inv_freq, geometry.length, geometry.succ_length, geometry.inter_position
            )
        self.out, self.lse = self.forward()

    def forward(self) -> tuple[torch.Tensor, ...]:
        if self.dual_chunk:
            return dual_chunk_fwd(self.operands, self.rotation, self.pack, self.options)
        launch = hopper.varlen_fwd if self.hopper else varlen_fwd
        return launch(self.q, self.k, self.v, self.pack, self.options)

    def backward(self) -> tuple[torch.Tensor, ...]:
        saved = (self.out, self.lse, self.pack, self.options)
        if self.dual_chunk:
            return dual_chunk_bwd(self.dout, None, self.operands, self.rotation, *saved)
        launch = hopper.varlen_bwd if self.hopper else varlen_bwd
        return launch(self.dout, None, self.q, self.k, self.v, *saved)


def _precompile(job: tuple[str, str, Workload, float]) -> None:
    operation, candidate, workload, dropout_p = job
    tiny = Workload("tiny", (300, 20), workload.heads, workload.heads_kv, workload.head_dim)
    try:
        with override(operation, candidate):
            case = _Case(tiny, dropout_p, operation)
            if not operation.endswith("_fwd"):
                case.backward()
        torch.cuda.synchronize()
    except Exception as error:  # reported again, with its message, when it is timed
        print(f"precompile {operation} {candidate}: {type(error).__name__}", flush=True)


def time_candidates(
    workload: Workload, operation: str, candidates: list[str], dropout_p: float
) -> list[dict]:
    """Times each candidate on one workload; the backward's other kernels stay as in the table.

    Args:
        workload: Workload to time.
        operation: A key of the candidates, such as "varlen_fwd".
        candidates: Texts for parse_config.
        dropout_p: Dropout probability.

    Returns:
        A row per candidate: workload, operation, config, ms (None where it failed), error or None.
    """
    case = _Case(workload, dropout_p, operation)
    forward = operation.endswith("_fwd")
    run = case.forward if forward else case.backward
    expected = [x.float() for x in run()]
    rows = []
    for candidate in candidates:
        row: dict[str, Any] = {"workload": workload.name, "operation": operation}
        row["config"] = candidate
        row |= {"dropout_p": dropout_p, "ms": None, "error": None}
        try:
            with override(operation, candidate):
                pairs = zip(run(), expected, strict=True)
                difference = max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)
                if not difference < 1e-2:
                    raise ValueError(f"result differs from the table's by {difference:.1e}")
                row["ms"] = do_bench(run, warmup=20, rep=80, return_mode="median")
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:120]
        rows.append(row)
        flops = workload.forward_flops if forward else workload.backward_flops
        speed = (
            f"{row['ms']:8.3f} ms {flops / row['ms'] / 1e9:6.1f} TF" if row["ms"] else row["error"]
        )
        print(f"{workload.name:12} {operation:14} p={dropout_p} {candidate:22} {speed}", flush=True)
    return rows


def main() -> None:
    """Command line: --operations, --workloads, --dropout, --candidates, --output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", default="varlen_fwd,varlen_dq,varlen_dkv")
    parser.add_argument("--workloads", default="1x32k,mix32k,1x32k_d64,mix32k_d64")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--candidates", help="space-separated, instead of the built-in list")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    workloads = [WORKLOADS[name] for name in arguments.workloads.split(",")]
    operations = arguments.operations.split(",")

    def candidates(operation: str, workload: Workload) -> list[str]:
        text = arguments.candidates or _CANDIDATES[operation][workload.head_dim]
        return text.split()

    by_shape = {(w.heads, w.heads_kv, w.head_dim): w for w in workloads}.values()
    jobs = [
        (operation, candidate, workload, arguments.dropout)
        for operation, workload in itertools.product(operations, by_shape)
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
