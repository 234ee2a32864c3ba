"""Checks a kernel's error against float64 before its times are reported."""

from dataclasses import replace
from itertools import pairwise

import torch

from lctrain_kernels import flash_attn_varlen_func, make_schedule
from lctrain_kernels.bench.accuracy import ErrorRatio, error_ratio
from lctrain_kernels.bench.inputs import AttentionInputs, make_inputs
from lctrain_kernels.bench.workloads import Workload
from lctrain_kernels.reference.attention import dense_attention

LONGEST = 2048
MOST_TOKENS = 8192
SEED = 20_240_217


def scale_down(workload: Workload, longest: int = LONGEST, tokens: int = MOST_TOKENS) -> Workload:
    """Shortens the documents in proportion, so that a dense float64 reference fits into memory.

    Args:
        workload: Workload to shorten.
        longest: Most tokens of a document.
        tokens: Most tokens of all documents together; later documents are left out.
    """
    factor = min(1.0, longest / max(workload.lengths))
    lengths: list[int] = []
    for length in workload.lengths:
        # Odd lengths, so that the last tile of a document is never full.
        shorter = length if factor == 1.0 else max(1, int(length * factor) - 1) | 1
        if sum(lengths) + shorter > tokens:
            break
        lengths.append(shorter)
    return replace(workload, lengths=tuple(lengths))


def check_ours(workload: Workload, device: torch.device | str) -> dict[str, ErrorRatio]:
    """Measures lctrain's error in the output and every gradient, on a shortened workload.

    Args:
        workload: Workload to check; its documents are shortened.
        device: Device of the kernel.

    Returns:
        The errors of out, dq, dk and dv against float64, relative to those of plain PyTorch.
    """
    inputs = make_inputs(scale_down(workload), device)
    cu, longest = inputs.cu_seqlens, inputs.max_seqlen
    out = flash_attn_varlen_func(
        *inputs.leaves,
        cu,
        cu,
        longest,
        longest,
        workload.dropout_p,
        causal=True,
        dropout_seed=SEED if workload.dropout_p else None,
        schedule=make_schedule(inputs.workload.lengths).to(device),
    )
    assert isinstance(out, torch.Tensor)
    ours = (out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.grad_out))
    plain = _dense(inputs, inputs.q.dtype)
    exact = _dense(inputs, torch.float64)
    names = ("out", "dq", "dk", "dv")
    return {
        name: error_ratio(*tensors)
        for name, tensors in zip(names, zip(ours, plain, exact, strict=True), strict=True)
    }


def _dense(inputs: AttentionInputs, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Returns (out, dq, dk, dv) of plain PyTorch in `dtype`, by one dense softmax per document."""
    parts: list[tuple[torch.Tensor, ...]] = []
    bounds = inputs.cu_seqlens.tolist()
    for document, (begin, end) in enumerate(pairwise(bounds)):
        leaves = [x[begin:end].detach().to(dtype).requires_grad_() for x in inputs.leaves]
        out, _, _ = dense_attention(
            *leaves,
            window=(-1, 0),
            dropout_p=inputs.workload.dropout_p,
            dropout_seed=SEED,
            document_id=document,
        )
        grads = torch.autograd.grad(out, leaves, inputs.grad_out[begin:end].to(dtype))
        parts.append((out.detach(), *grads))
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
