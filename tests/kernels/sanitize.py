"""Runs every kernel once on tiny inputs, under NVIDIA's compute-sanitizer.

On a Hopper GPU the Gluon kernels run, too. Names of groups choose what runs; all do by default.

    compute-sanitizer --tool memcheck python tests/kernels/sanitize.py
    compute-sanitizer --tool racecheck python tests/kernels/sanitize.py decode sampling

The exit status is not 0 if a result is not finite. The sanitizer prints its own findings.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from lctrain.kernels import batch_invariant_linear, flash_attn_varlen_func, select_backend
from tests.kernels.cases import GPU_CASES, GPU_DUAL_CHUNK_CASES
from tests.kernels.decode import test_kvcache, test_packed, test_prefixes
from tests.kernels.decode.kvcache import make_kv
from tests.kernels.decode.sharing import plan_of, share, shared_of
from tests.kernels.differential import oracle as differential
from tests.kernels.differential import test_cached as differential_cached
from tests.kernels.differential.cases import GPU_CASES as DIFFERENTIAL_CASES
from tests.kernels.dual_chunk import test_cached as dual_chunk_cached
from tests.kernels.oracle import attention, make_inputs
from tests.kernels.sampling.test_draw import draw, noise

DOCUMENTS = ((70, 70), (0, 0), (1, 1), (33, 130), (65, 20), (5, 0), (0, 7))
NAMES = (
    "D64-causal",
    "D64-window_left-causal",
    "D80-causal-dropout-g8",
    "D128-everything-g8",
    "D256-dropout-softcap-g1",
    "D64-causal-float32",
)
DUAL_CHUNK_NAMES = ("D64", "D64-dropout-scale-fused_qkv", "D128-g4", "D256-g4-scale", "D20-float16")
HOPPER_DUAL_CHUNK_NAMES = ("D64", "D128-g4")
DIFFERENTIAL_NAMES = ("v1-dropout", "v1-tokens-full", "v2-window_on_device", "D96v192", "D20v40")
HOPPER_DIFFERENTIAL_NAMES = ("v1-tokens-full", "v2-window_on_device", "D20v40")

Results = Iterator[tuple[str, dict[str, Tensor]]]


def varlen_results(device: str) -> Results:
    for name in NAMES:
        case = dataclasses.replace(GPU_CASES[name], documents=DOCUMENTS, fused_qkv=False)
        inputs = make_inputs(case, device)
        yield name, dict(attention(case, inputs, backend="triton").items())
        if select_backend(device, case.dtype) == "hopper":
            for deterministic in (False, True):
                options = {"backend": "auto", "deterministic": deterministic}
                found = attention(case, inputs, **options)
                yield f"hopper {name} {deterministic}", dict(found.items())


def dual_chunk_results(device: str) -> Results:
    for name in DUAL_CHUNK_NAMES:
        case = dataclasses.replace(
            GPU_DUAL_CHUNK_CASES[name], documents=DOCUMENTS, fused_qkv=False, chunks=(31, 6)
        )
        inputs = make_inputs(case, device)
        yield name, dict(attention(case, inputs, backend="triton").items())
        if name in HOPPER_DUAL_CHUNK_NAMES and select_backend(device, case.dtype) == "hopper":
            yield f"hopper {name}", dict(attention(case, inputs, backend="hopper").items())


def differential_results(device: str) -> Results:
    for name in DIFFERENTIAL_NAMES:
        pair = dataclasses.replace(DIFFERENTIAL_CASES[name], documents=DOCUMENTS, views="")
        inputs = differential.make_inputs(pair, device)
        yield name, dict(differential.attention(pair, inputs, backend="triton").items())
        if name in HOPPER_DIFFERENTIAL_NAMES and select_backend(device, pair.dtype) == "hopper":
            found = differential.attention(pair, inputs, backend="hopper")
            yield f"hopper {name}", dict(found.items())


def decode_results(device: str) -> Results:
    for name, case in test_kvcache.CASES.items():
        out, lse = make_kv(case, device).call(backend="triton")
        yield name, {"out": out, "lse": lse}
    for name, case in test_prefixes.CASES.items():
        inputs = make_kv(case, device)
        share(inputs, case, (0, 1, 3), 128)
        plan = plan_of(inputs, case, shared_of(inputs, case))
        out, lse = inputs.call(backend="triton", plan=plan)
        yield f"shared {name}", {"out": out, "lse": lse}
    for name, packed in test_packed.CASES.items():
        arguments, options, _ = test_packed.make_call(packed, device)
        out, lse = flash_attn_varlen_func(*arguments, **options, backend="triton")
        yield f"packed {name}", {"out": out, "lse": lse}
    for name, (case, *sizes) in dual_chunk_cached.CASES.items():
        out, lse = dual_chunk_cached.call(make_kv(case, device), "triton", *sizes)
        yield f"dual chunk {name}", {"out": out, "lse": lse}
    for name, case in differential_cached.CASES.items():
        lam = torch.rand(case.heads // 2, device=device)
        for halves in (True, False):
            out = differential_cached.call(make_kv(case, device), lam, halves, "triton")
            yield f"differential {name} {halves}", {"out": out}


def sampling_results(device: str) -> Results:
    for top_p in (1.0, 0.9):
        logits = torch.randn(5, 3001, device=device).half()
        tokens, log_probs = draw(logits, *noise(5, 3001, device), 0.7, top_p)
        yield f"top_p {top_p}", {"tokens": tokens, "log_probs": log_probs}
    for rows, width, columns in ((5, 200, 77), (300, 64, 130)):
        x, weight = torch.randn(rows, width), torch.randn(columns, width)
        found = batch_invariant_linear(x.to(device).half(), weight.to(device).half())
        yield f"linear {rows}", {"out": found}


GROUPS = {
    "varlen": varlen_results,
    "dual_chunk": dual_chunk_results,
    "differential": differential_results,
    "decode": decode_results,
    "sampling": sampling_results,
}


def main(groups: list[str], device: str = "cuda") -> int:
    """Runs each configuration of the groups; returns the exit status."""
    for group in groups or GROUPS:
        for name, found in GROUPS[group](device):
            for part, tensor in found.items():
                # Blind rows have lse = -inf.
                if not part.startswith("lse") and not tensor.isfinite().all():
                    print(f"{group} {name}: {part} is not finite")
                    return 1
            print(f"{group} {name}: ran", flush=True)
    return 0


if __name__ == "__main__":
    # One block of memory per tensor, so that a read beyond a tensor is one beyond an allocation.
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    sys.exit(main(sys.argv[1:]))
