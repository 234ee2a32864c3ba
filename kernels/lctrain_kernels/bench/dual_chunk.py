"""Times dual chunk attention: python -m lctrain_kernels.bench.dual_chunk --out FILE.

All contenders run on the same tensors in one process:

- lctrain's dual chunk attention, with portable and with Hopper kernels;
- lctrain's causal attention, whose matrix products have as many FLOPs;
- the published formulation, on FlashAttention-4 and on FlashAttention-2 in PyTorch.

lctrain's output and gradients are checked first: their error against float64 may be at most twice
that of plain PyTorch.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lctrain_kernels import dual_chunk_attn_varlen_func, make_schedule
from lctrain_kernels.backend import hopper_serves
from lctrain_kernels.bench import published_dual_chunk as published
from lctrain_kernels.bench.accuracy import ErrorRatio, error_ratio
from lctrain_kernels.bench.check import scale_down
from lctrain_kernels.bench.inputs import AttentionInputs, make_inputs
from lctrain_kernels.bench.measure import gpu_timer
from lctrain_kernels.bench.peers import PEERS, Call, Peer
from lctrain_kernels.bench.run import new_record, run_workloads
from lctrain_kernels.bench.workloads import Workload
from lctrain_kernels.dual_chunk.reference import dense_dual_chunk_attention

CHUNK_SIZE, LOCAL_SIZE = 4095, 512  # of a model that was trained on windows of 4,096
_32K = 32 * 1024
# In the mix, half of the documents are longer than the window of 4,096.
_MIX = (9000, 700, 6500, 2900, 5100, 1800, 4700, 2068)
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("1x32k", (_32K,), 32, 8, 128),
        Workload("mix32k_long", _MIX, 32, 8, 128),
        Workload("1x128k", (4 * _32K,), 32, 8, 128),
        Workload("1x32k_d64", (_32K,), 32, 32, 64),
        Workload("1x32k_d96", (_32K,), 32, 8, 96),
        Workload("1x32k_d256", (_32K,), 16, 4, 256),
        Workload("1x32k_dropout", (_32K,), 32, 8, 128, dropout_p=0.1),
    )
}


def frequencies(head_dim: int, device: torch.device) -> torch.Tensor:
    """Returns the RoPE frequencies [D/2] float32 of base 10,000, in radians per position."""
    columns = torch.arange(0, head_dim, 2, dtype=torch.float64)
    return (10_000 ** -(columns / head_dim)).float().to(device)


def lctrain_dual_chunk(inputs: AttentionInputs, backend: str = "auto") -> Call:
    """Returns the call of lctrain's dual chunk attention that is timed.

    Its tile schedule is built beforehand, as once per batch in training.
    """
    schedule = make_schedule(inputs.workload.lengths).to(inputs.q.device)
    inv_freq = frequencies(inputs.workload.head_dim, inputs.q.device)

    def call() -> torch.Tensor:
        out = dual_chunk_attn_varlen_func(
            *inputs.leaves,
            inputs.cu_seqlens,
            inputs.max_seqlen,
            inv_freq=inv_freq,
            chunk_size=CHUNK_SIZE,
            local_size=LOCAL_SIZE,
            dropout_p=inputs.workload.dropout_p,
            schedule=schedule,
            backend=backend,
        )
        assert isinstance(out, torch.Tensor)
        return out

    return call


def _published(attend: published.Attend, inputs: AttentionInputs) -> Call:
    inv_freq = frequencies(inputs.workload.head_dim, inputs.q.device)
    return lambda: published.published_dual_chunk_attn(
        *inputs.leaves,
        inputs.cu_seqlens,
        inputs.max_seqlen,
        inv_freq=inv_freq,
        chunk_size=CHUNK_SIZE,
        local_size=LOCAL_SIZE,
        attend=attend,
        call_per_chunk=True,
    )


def _without_dropout(prepare: Callable[[AttentionInputs], Call]) -> Callable[..., Call]:
    def checked(inputs: AttentionInputs) -> Call:
        from lctrain_kernels.bench.peers import UnsupportedWorkload

        if inputs.workload.dropout_p:
            raise UnsupportedWorkload("has no dropout")
        return prepare(inputs)

    return checked


DUAL_CHUNK_PEERS = (
    Peer("dual_chunk", "lctrain, dual chunk", "lctrain.kernels", "lctrain", lctrain_dual_chunk),
    replace(PEERS["lctrain"], name="causal", title="lctrain, causal"),
    Peer(
        "dual_chunk_portable",
        "lctrain, dual chunk, portable",
        "lctrain.kernels",
        "lctrain",
        partial(lctrain_dual_chunk, backend="triton"),
    ),
    replace(PEERS["portable"], name="causal_portable", title="lctrain, causal, portable"),
    Peer(
        "published_fa4",
        "published, on FlashAttention-4",
        "flash_attn.cute",
        "flash-attn-4",
        _without_dropout(partial(_published, published.attend_with_flash_attention_4)),
    ),
    Peer(
        "published_fa2",
        "published, on FlashAttention-2 in torch",
        "torch",
        "torch",
        _without_dropout(partial(_published, published.attend_with_torch)),
    ),
)


def check_dual_chunk(
    workload: Workload, device: torch.device, backend: str = "triton"
) -> dict[str, ErrorRatio]:
    """Measures lctrain's errors against float64, relative to those of plain PyTorch.

    The reference is dense, so the check runs a workload with shorter documents, which
    `check.scale_down` makes, and without dropout. A chunk is about a quarter of the longest
    document.

    Args:
        workload: Workload to check.
        device: Device of the kernel.
        backend: Backend of the kernel.

    Returns:
        The error ratios of out, dq, dk and dv.
    """
    short = replace(scale_down(workload), dropout_p=0.0)
    inputs = make_inputs(short, device)
    options: dict[str, Any] = {
        "inv_freq": frequencies(short.head_dim, device),
        "chunk_size": max(short.lengths) // 4,
        "local_size": max(short.lengths) // 32,
    }
    out = dual_chunk_attn_varlen_func(
        *inputs.leaves, inputs.cu_seqlens, inputs.max_seqlen, **options, backend=backend
    )
    assert isinstance(out, torch.Tensor)
    ours = (out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.grad_out))
    dense = [_dense(inputs, dtype, options) for dtype in (inputs.q.dtype, torch.float64)]
    return {
        name: error_ratio(*tensors)
        for name, tensors in zip(
            ("out", "dq", "dk", "dv"), zip(ours, *dense, strict=True), strict=True
        )
    }


def _dense(
    inputs: AttentionInputs, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    parts: list[tuple[torch.Tensor, ...]] = []
    for begin, end in pairwise(inputs.cu_seqlens.tolist()):
        leaves = [x[begin:end].detach().to(dtype).requires_grad_() for x in inputs.leaves]
        out, _ = dense_dual_chunk_attention(*leaves, **options)
        grads = torch.autograd.grad(out, leaves, inputs.grad_out[begin:end].to(dtype))
        parts.append((out.detach(), *grads))
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: --workloads, --out, --milliseconds, --repetitions.

    Returns:
        The exit status: 2 without a GPU, otherwise 0.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--milliseconds", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("This benchmark needs a GPU, and torch sees none.", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    workloads = [WORKLOADS[name] for name in arguments.workloads.split(",")]
    peers = []
    for peer in DUAL_CHUNK_PEERS:
        reason = peer.missing()
        if reason is None:
            peers.append(peer)
        else:
            print(f"left out {peer.name}: {reason}", flush=True)
    record = new_record(peers, device, arguments.repetitions, arguments.milliseconds)
    record.settings |= {"chunk_size": CHUNK_SIZE, "local_size": LOCAL_SIZE}
    record.settings["titles"] = {peer.name: peer.title for peer in peers}
    for workload in {w.head_dim: w for w in workloads}.values():
        has_hopper = hopper_serves(device) and workload.head_dim <= 128
        for backend in ("triton", "hopper") if has_hopper else ("triton",):
            ratios = check_dual_chunk(workload, device, backend)
            text = {name: round(max(r.norm, r.maximum), 3) for name, r in ratios.items()}
            print(f"{backend}: error ratios at D = {workload.head_dim}: {text}", flush=True)
            record.settings[f"error_ratios_d{workload.head_dim}_{backend}"] = text
            if not all(ratio.passes for ratio in ratios.values()):
                raise SystemExit("error above twice that of plain PyTorch: no figures")
    timer = gpu_timer(arguments.milliseconds)
    for name in run_workloads(
        record, workloads, peers, device, timer, repetitions=arguments.repetitions
    ):
        for peer in peers:
            row = next(r for r in record.results if (r.workload, r.peer) == (name, peer.name))
            if row.status != "ok":
                print(f"{name:14} {peer.name:14} {row.status}: {row.reason}", flush=True)
                continue
            peaks = [(row.forward_peak_bytes or 0) / 2**30, (row.peak_bytes or 0) / 2**30]
            print(
                f"{name:14} {peer.name:14} {row.forward_ms:8.3f} / {row.backward_ms:8.3f} ms, "
                f"peak {peaks[0]:.2f} / {peaks[1]:.2f} GiB",
                flush=True,
            )
        record.save(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
