"""Compiles kernels for a GPU that need not be there: `aot_compile.py sm_90 causal,all 64,128`.

The target "hopper" is the kernels of lctrain.kernels.hopper, compiled for sm_90; it takes a fourth
list, of group sizes. Prints one JSON object per variant. Runs in a process of its own: without
TRITON_INTERPRET, and with whichever Triton comes first on PYTHONPATH.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # ptxas reports spills only when it runs

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from lctrain.kernels.attention import aot as attention_aot
from lctrain.kernels.tile.variant import KernelVariant

MATRIX_INSTRUCTIONS = {
    "sm_80": r"\bmma\.sync",
    "sm_90": r"\bwgmma\.mma_async",
    "hopper": r"\bwgmma\.mma_async",
    "sm_100": r"\b(?:tcgen05\.mma|mma\.sync)",
    "gfx942": r"\bv_mfma",
    "gfx950": r"\bv_mfma",
}
# Copies of the copy engine from global to shared memory.
TMA_LOADS = re.compile(r"\bcp\.async\.bulk\.tensor\.\d+d\.shared")
# ptxas' notes that it runs asynchronous products one by one, or has no registers for them.
SERIALISED = re.compile(r"C751[0-9]")
# Named barriers by number, as Triton writes them; those of signals.py are in registers.
BARRIERS = re.compile(r"\bbar(?:rier)?(?:\.cta)?\.(?:sync|arrive|red)\S*\s+(\d+)")
# Address, predicate, name and operands of a machine instruction.
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/ +(@\S+ +)?([A-Z][A-Z0-9_.]*)([^;]*);")


def gpu_target(name: str) -> GPUTarget:
    """The compiler's name for "sm_90", "hopper" or "gfx942"."""
    if name == "hopper":
        name = "sm_90"
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


def is_nvidia(target: str) -> bool:
    return not target.startswith("gfx")


def spill_bytes(target: str, compiled: triton.compiler.CompiledKernel, log: str) -> int:
    """Bytes per thread that registers had no room for, as the assembler counts them."""
    if is_nvidia(target):
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert spills, f"ptxas reported nothing: {log!r}"
        return max(int(stores) + int(loads) for stores, loads in spills)
    counts = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
    assert counts, "the assembly has no spill counts"
    return 4 * sum(int(count) for count in counts)


def loop_spills(compiled: triton.compiler.CompiledKernel) -> list[int]:
    """Reads and writes of spilled registers inside each innermost loop of wgmma's products.

    A kernel whose warps are specialised has a loop per warpgroup. What is spilled outside of it
    costs a few cycles per tile; what is spilled inside is paid for with every block of keys.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", cubin.name]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    code = [
        (int(address, 16), predicate, name, operands)
        for address, predicate, name, operands in INSTRUCTION.findall(sass)
    ]
    loops = []
    for end, predicate, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        # Branches back without a condition return from a wait that took long.
        if name.startswith("BRA") and predicate and target and int(target[1], 16) < end:
            inside = [what for at, _, what, _ in code if int(target[1], 16) <= at <= end]
            if any(what.startswith("HGMMA") for what in inside):
                loops.append((int(target[1], 16), end, inside))
    return [
        sum(what.startswith(("LDL", "STL")) for what in inside)
        for begin, end, inside in loops
        if not any(
            begin <= first and last <= end and (first, last) != (begin, end)
            for first, last, _ in loops
        )
    ]


def compile_variant(target: str, variant: KernelVariant) -> dict:
    """Returns the instructions, spills, shared memory and seconds of one compilation."""
    source = (GluonASTSource if variant.kernel.is_gluon() else ASTSource)(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs=variant.constants,
        attrs=variant.attributes,
    )
    start = time.perf_counter()
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=gpu_target(target), options=variant.options)
    assembly = compiled.asm["ptx" if is_nvidia(target) else "amdgcn"]
    extra = {}
    if target == "hopper":
        barriers = sorted({int(number) for number in BARRIERS.findall(assembly)})
        extra = {"loop_spills": loop_spills(compiled), "barriers": barriers}
    return {
        "matrix_instructions": len(re.findall(MATRIX_INSTRUCTIONS[target], assembly)),
        "tma_loads": len(TMA_LOADS.findall(assembly)),
        "spill_bytes": spill_bytes(target, compiled, log.getvalue()),
        "spill_free": variant.spill_free,
        "serialised": bool(SERIALISED.search(log.getvalue())),
        "shared_bytes": compiled.metadata.shared,
        "seconds": round(time.perf_counter() - start, 2),
        **extra,
    }


def described(
    target: str, features: Sequence[str], head_dims: Sequence[int], groups: Sequence[int]
) -> Iterator[KernelVariant]:
    """The variants for a target; groups matter to "hopper" alone."""
    if target == "hopper":
        from lctrain.kernels.hopper import aot as hopper_aot  # the others need no Gluon

        return hopper_aot.kernel_variants(tuple(head_dims), tuple(features), tuple(groups))
    return attention_aot.kernel_variants(target, tuple(head_dims), tuple(features))


def compile_variants(target: str, variants: Iterator[KernelVariant]) -> Iterator[dict]:
    """Yields what `compile_variant` found, or the error, for every variant for one GPU."""
    for variant in variants:
        line = {"name": variant.name, "triton": triton.__version__}
        try:
            yield line | compile_variant(target, variant)
        except Exception as error:  # the others are worth knowing about too
            yield line | {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    TARGET, FEATURES = sys.argv[1], sys.argv[2].split(",")
    HEAD_DIMS, GROUPS = (
        [int(size) for size in text.split(",")] for text in (*sys.argv[3:], "1,2,4")[:2]
    )
    for line in compile_variants(TARGET, described(TARGET, FEATURES, HEAD_DIMS, GROUPS)):
        print(json.dumps(line), flush=True)
