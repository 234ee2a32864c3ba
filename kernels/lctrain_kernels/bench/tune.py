"""Times tile configurations of plain attention on a GPU, to find the best ones for the tables.

The command is python -m lctrain_kernels.bench.tune; --help lists its options.
"""

import contextlib

import torch

from lctrain_kernels import make_schedule
from lctrain_kernels.bench import tuning
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
# Hopper forward: keys of a block, stages of keys and values, stages of queries, warpgroups, whether
# warps synchronise before the products.
_HOPPER_FORWARD = {
    64: "64,4,2,3,0 64,4,2,3,1 128,3,2,3,0 128,3,2,3,1 128,3,2,2,0 128,3,2,2,1",
    96: "128,2,2,2,0 128,2,2,2,1 64,4,2,2,0",
    128: "128,2,2,2,0 128,2,2,2,1 64,4,2,2,0",
    256: "64,2,1,2,0 64,2,1,2,1",
}
# Hopper backward: queries of a block, stages, whether dq is added from registers.
_HOPPER_BACKWARD = {
    64: "128,2,1 128,3,1 64,4,1 64,3,1 64,3,0",
    96: "64,2,0 64,4,1",
    128: "64,2,0 64,4,1",
}
CANDIDATES = {
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
    """Returns the TileConfig of a candidate on the command line.

    The text is block_m,block_n,num_warps,num_stages[,pack[,max_registers]].
    """
    block_m, block_n, num_warps, num_stages, *rest = (int(part) for part in text.split(","))
    pack = rest[0] if rest else 1
    max_registers = rest[1] if len(rest) > 1 else None
    return TileConfig(block_m, block_n, num_warps, num_stages, pack, max_registers)


def override(operation: str, candidate: str) -> contextlib.AbstractContextManager[None]:
    """Returns a context manager that replaces the tile configuration of an operation.

    Raises:
        ValueError: if the candidate is not a list of as many integers as the operation takes.
    """
    if not operation.startswith("hopper"):
        return override_configs(**{operation: parse_config(candidate)})
    first, second, *rest = (int(part) for part in candidate.split(","))
    if operation == "hopper_fwd":
        q_stages, consumers, early = rest
        tile = ForwardTile(first, second, q_stages, consumers, bool(early))
        return override_tiles(forward=tile)
    (from_registers,) = rest
    return override_tiles(backward=BackwardTile(first, second, bool(from_registers)))


class VarlenCase:
    """The tensors of a workload of plain attention, and the kernel calls that are timed on them."""

    def __init__(
        self, workload: Workload, dropout_p: float, operation: str, device: str = "cuda"
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def draw(heads: int) -> torch.Tensor:
            shape = (workload.tokens, heads, workload.head_dim)
            return torch.randn(shape, device=device, dtype=dtype, generator=generator)

        self.q, self.dout = draw(workload.heads), draw(workload.heads)
        self.k, self.v = draw(workload.heads_kv), draw(workload.heads_kv)
        lengths = torch.tensor((0, *workload.lengths))
        self.cu = lengths.cumsum(0).to(device=device, dtype=torch.int32)
        self.schedule = make_schedule(workload.lengths).to(device)
        tiles = self.schedule.q_tiles, self.schedule.k_tiles
        self.pack = TiledPack(self.cu, self.cu, *tiles, max_seqlen_q=max(workload.lengths))
        self.options = AttentionOptions(
            softmax_scale=workload.head_dim**-0.5,
            window_right=0,
            dropout_p=dropout_p,
            dropout_seed=torch.full((1,), 7, device=device) if dropout_p else None,
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

    def run(self, operation: str) -> tuple[torch.Tensor, ...]:
        return self.forward() if operation.endswith("_fwd") else self.backward()


def head_dim_of(workload: Workload) -> int:
    """Returns the head dim of a workload; the built-in candidates are listed by head dim."""
    return workload.head_dim


TUNER = tuning.Tuner(WORKLOADS, CANDIDATES, head_dim_of, VarlenCase, override)


def main() -> None:
    """Runs the tuner from the command line; see `tuning.main` for the options."""
    workloads, operations = "1x32k,mix32k,1x32k_d64,mix32k_d64", "varlen_fwd,varlen_dq,varlen_dkv"
    tuning.main(TUNER, __doc__, workloads, operations)


if __name__ == "__main__":
    main()
