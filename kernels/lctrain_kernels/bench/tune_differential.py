"""Times tile configurations of differential attention on a GPU; tune.py does so for plain one.

python -m lctrain_kernels.bench.tune_differential --output rows.json
"""

import torch
from torch import Tensor

from lctrain_kernels import make_schedule
from lctrain_kernels.bench import tuning
from lctrain_kernels.bench.differential import (
    DIFFERENTIAL_WORKLOADS,
    DifferentialWorkload,
    make_inputs,
)
from lctrain_kernels.bench.tune import override
from lctrain_kernels.differential.triton_bwd import differential_bwd
from lctrain_kernels.differential.triton_fwd import differential_fwd
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import TiledPack

# Version -> candidates. ptxas serialises the products of none of them (sm_90, Triton 3.6.0).
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


class DifferentialCase:
    """The tensors of a differential workload, and the portable kernel calls that are timed."""

    def __init__(
        self,
        workload: DifferentialWorkload,
        dropout_p: float,
        operation: str,
        device: str = "cuda",
    ) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        inputs = make_inputs(workload, device, dtype)
        q1, q2, k1, k2 = (x.detach() for x in inputs.branches())
        lam = inputs.lam.detach().float().expand(q1.shape[:2])
        shared = workload.version == 2
        self.schedule = make_schedule(workload.lengths).to(device)
        self.dout = inputs.grad_out
        self.cu = inputs.cu_seqlens
        self.operands = (q1, q2, k1, None if shared else k2, inputs.v.detach(), lam)
        self.pack = TiledPack(self.cu, self.cu, self.schedule.q_tiles, self.schedule.k_tiles)
        self.options = AttentionOptions(
            softmax_scale=workload.head_dim**-0.5,
            window_right=0,
            dropout_p=dropout_p,
            dropout_seed=torch.full((1,), 7, device=device) if dropout_p else None,
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
        return self.forward() if operation.endswith("_fwd") else self.backward()


def version_of(workload: DifferentialWorkload) -> int:
    """Returns the version (1 or 2) of a workload, by which the candidates are listed."""
    return workload.version


TUNER = tuning.Tuner(DIFFERENTIAL_WORKLOADS, CANDIDATES, version_of, DifferentialCase, override)


def main() -> None:
    """Runs the tuner from the command line; see `tuning.main` for the options."""
    workloads = "v1_1x32k,v1_mix32k,v2_1x32k,v2_mix32k"
    tuning.main(TUNER, __doc__, workloads, ",".join(CANDIDATES))


if __name__ == "__main__":
    main()
