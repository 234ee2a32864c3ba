"""Runs every kernel once on tiny packs, under NVIDIA's compute-sanitizer.

On a Hopper GPU the Gluon kernels run, too.

    compute-sanitizer --tool memcheck python tests/kernels/sanitize.py
    compute-sanitizer --tool racecheck python tests/kernels/sanitize.py

The exit status is not 0 if a result is not finite. The sanitizer prints its own findings.
"""

import dataclasses
import os
import sys
from pathlib import Path

# One block of memory per tensor, so that a read beyond a tensor is one beyond an allocation.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from lctrain.kernels import select_backend
from tests.kernels import differential_oracle as differential
from tests.kernels.cases import GPU_CASES, GPU_DUAL_CHUNK_CASES
from tests.kernels.differential.cases import GPU_CASES as DIFFERENTIAL_CASES
from tests.kernels.oracle import attention, make_inputs

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


def main() -> int:
    """Runs forward and backward of each configuration; returns the exit status."""
    results = {}
    for name in NAMES:
        case = dataclasses.replace(GPU_CASES[name], documents=DOCUMENTS, fused_qkv=False)
        inputs = make_inputs(case, "cuda")
        results[name] = attention(case, inputs, backend="triton")
        if select_backend("cuda", case.dtype) == "hopper":
            for deterministic in (False, True):
                results[f"hopper {name} {deterministic}"] = attention(
                    case, inputs, backend="auto", deterministic=deterministic
                )
    for name in DUAL_CHUNK_NAMES:
        case = dataclasses.replace(
            GPU_DUAL_CHUNK_CASES[name], documents=DOCUMENTS, fused_qkv=False, chunks=(31, 6)
        )
        inputs = make_inputs(case, "cuda")
        results[f"dual chunk {name}"] = attention(case, inputs, backend="triton")
        if name in HOPPER_DUAL_CHUNK_NAMES and select_backend("cuda", case.dtype) == "hopper":
            results[f"hopper dual chunk {name}"] = attention(case, inputs, backend="hopper")
    for name in DIFFERENTIAL_NAMES:
        pair = dataclasses.replace(DIFFERENTIAL_CASES[name], documents=DOCUMENTS, views="")
        inputs = differential.make_inputs(pair, "cuda")
        results[f"differential {name}"] = differential.attention(pair, inputs, backend="triton")
        if name in HOPPER_DIFFERENTIAL_NAMES and select_backend("cuda", pair.dtype) == "hopper":
            result = differential.attention(pair, inputs, backend="hopper")
            results[f"hopper differential {name}"] = result
    torch.cuda.synchronize()
    for name, result in results.items():
        for part, tensor in result.items():
            # Blind rows have lse = -inf.
            if not part.startswith("lse") and not tensor.isfinite().all():
                print(f"{name}: {part} is not finite")
                return 1
        print(f"{name}: ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
