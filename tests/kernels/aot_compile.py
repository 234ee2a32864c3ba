"""Compiles kernels for a GPU that need not be there: `aot_compile.py sm_90 causal,all 64,128`.

Prints one JSON object per variant. Runs in a process of its own: without TRITON_INTERPRET, and
with whichever Triton comes first on PYTHONPATH.
"""

import contextlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence

os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # ptxas reports spills only when it runs

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lctrain.kernels.attention.aot import KernelVariant, kernel_variants

MATRIX_INSTRUCTIONS = {
    "sm_80": r"\bmma\.sync",
    "sm_90": r"\bwgmma\.mma_async",
    "sm_100": r"\b(?:tcgen05\.mma|mma\.sync)",
    "gfx942": r"\bv_mfma",
    "gfx950": r"\bv_mfma",
}


# ptxas' notes that it runs asynchronous products one by one, or has no registers for them.
SERIALISED = re.compile(r"C751[0-9]")


def gpu_target(name: str) -> GPUTarget:
    """The compiler's name for "sm_90" or "gfx942"."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


def spill_bytes(target: str, compiled: triton.compiler.CompiledKernel, log: str) -> int:
    """Bytes per thread that registers had no room for, as the assembler counts them."""
    if target.startswith("sm_"):
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert spills, f"ptxas reported nothing: {log!r}"
        return max(int(stores) + int(loads) for stores, loads in spills)
    counts = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
    assert counts, "the assembly has no spill counts"
    return 4 * sum(int(count) for count in counts)


def compile_variant(target: str, variant: KernelVariant) -> dict:
    """Returns name, matrix instructions, spills, shared memory and seconds of one compilation."""
    source = ASTSource(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs=variant.constants,
        attrs=variant.attributes,
    )
    start = time.perf_counter()
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=gpu_target(target), options=variant.options)
    assembly = compiled.asm["ptx" if target.startswith("sm_") else "amdgcn"]
    return {
        "matrix_instructions": len(re.findall(MATRIX_INSTRUCTIONS[target], assembly)),
        "spill_bytes": spill_bytes(target, compiled, log.getvalue()),
        "spill_free": variant.spill_free,
        "serialised": bool(SERIALISED.search(log.getvalue())),
        "shared_bytes": compiled.metadata.shared,
        "seconds": round(time.perf_counter() - start, 2),
    }


def compile_variants(
    target: str, features: Sequence[str], head_dims: Sequence[int]
) -> Iterator[dict]:
    """Yields what `compile_variant` found, or the error, for every variant for one GPU."""
    for variant in kernel_variants(target, tuple(head_dims), tuple(features)):
        line = {"name": variant.name, "triton": triton.__version__}
        try:
            yield line | compile_variant(target, variant)
        except Exception as error:  # the others are worth knowing about too
            yield line | {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    TARGET, FEATURES = sys.argv[1], sys.argv[2].split(",")
    HEAD_DIMS = [int(size) for size in sys.argv[3].split(",")]
    for line in compile_variants(TARGET, FEATURES, HEAD_DIMS):
        print(json.dumps(line), flush=True)
