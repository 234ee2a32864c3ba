"""The tensors of an attention workload, which all timed libraries share."""

from dataclasses import dataclass

import torch

from lctrain_kernels.bench.workloads import Workload


@dataclass(frozen=True)
class AttentionInputs:
    """Random tensors for one workload.

    Attributes:
        workload: Workload of the tensors.
        q: Packed queries [T, H, D], require a gradient.
        k: Packed keys [T, Hk, D], require a gradient.
        v: Packed values [T, Hk, D], require a gradient.
        grad_out: Gradient of the output, [T, H, D].
        cu_seqlens: Cumulative document lengths, [N + 1] int32.
        max_seqlen: Length of the longest document.
    """

    workload: Workload
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad_out: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the tensors that get a gradient."""
        return self.q, self.k, self.v


def make_inputs(
    workload: Workload, device: torch.device | str, dtype: torch.dtype = torch.bfloat16
) -> AttentionInputs:
    """Draws the tensors of a workload: standard normal, the same numbers on every call."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int, requires_grad: bool) -> torch.Tensor:
        shape = (workload.tokens, heads, workload.head_dim)
        tensor = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return tensor.requires_grad_(requires_grad)

    boundaries = torch.tensor([0, *workload.lengths]).cumsum(0)
    return AttentionInputs(
        workload=workload,
        q=draw(workload.heads, True),
        k=draw(workload.heads_kv, True),
        v=draw(workload.heads_kv, True),
        grad_out=draw(workload.heads, False),
        cu_seqlens=boundaries.to(device, torch.int32),
        max_seqlen=max(workload.lengths),
    )
