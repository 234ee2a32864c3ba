"""Compiles kernels for GPUs that this machine need not have, and reports registers and spills.

`aot_compile.py REQUEST` takes one JSON object: {"selections": [[target, features, head dims, group
sizes], ...], "known": [keys]}. The target "hopper" names the Gluon kernels, compiled for sm_90;
group sizes matter to "hopper" alone. The script prints one JSON object per variant; a variant whose
key is known is named and not compiled. It runs in a process of its own: without TRITON_INTERPRET,
and with whichever Triton comes first on PYTHONPATH.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # ptxas reports spills only when it runs

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from lctrain_kernels import aot as attention_aot
from lctrain_kernels.tile.variant import KernelVariant
from tests.kernels.aot_key import variant_key

MATRIX_INSTRUCTIONS = {
    "sm_80": r"\bmma\.sync",
    "sm_90": r"\bwgmma\.mma_async",
    "hopper": r"\bwgmma\.mma_async",
    "sm_100": r"\b(?:tcgen05\.mma|mma\.sync)",
    "gfx942": r"\bv_mfma",
    "gfx950": r"\bv_mfma",
}
# Decode has tiles of fewer rows than wgmma takes.
SMALL_TILES = r"\b(?:wgmma\.mma_async|mma\.sync)"
# Copies of the copy engine from global to shared memory.
TMA_LOADS = re.compile(r"\bcp\.async\.bulk\.tensor\.\d+d\.shared")
# ptxas' notes that it runs asynchronous products one by one, or has no registers for them.
SERIALISED = re.compile(r"C751[0-9]")
# Named barriers by number, as Triton writes them; those of gluon/barriers.py are in registers.
BARRIERS = re.compile(r"\bbar(?:rier)?(?:\.cta)?\.(?:sync|arrive|red)\S*\s+(\d+)")
# Divisions that may be off by two units in the last place.
FAST_DIVISIONS = re.compile(r"\bdiv\.(?:full|approx)")
# Address, predicate, name and operands of a machine instruction.
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/ +(@\S+ +)?([A-Z][A-Z0-9_.]*)([^;]*);")


def gpu_target(name: str) -> GPUTarget:
    """Returns Triton's GPU target for "sm_90", "hopper", "gfx942" and the like."""
    if name == "hopper":
        name = "sm_90"
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


def is_nvidia(target: str) -> bool:
    return not target.startswith("gfx")


def spill_bytes(target: str, compiled: triton.compiler.CompiledKernel, log: str) -> int:
    """Returns the bytes per thread that a compiled kernel spills from registers to local memory.

    Args:
        target: Target of the compilation.
        compiled: The compiled kernel.
        log: Output of ptxas.
    """
    if is_nvidia(target):
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert spills, f"ptxas reported nothing: {log!r}"
        return max(int(stores) + int(loads) for stores, loads in spills)
    counts = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
    assert counts, "the assembly has no spill counts"
    return 4 * sum(int(count) for count in counts)


def machine_code(compiled: triton.compiler.CompiledKernel) -> list[tuple[int, str, str, str]]:
    """Returns the instructions of an NVIDIA kernel: (address, predicate, name, operands)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", cubin.name]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [
        (int(address, 16), predicate, name, operands)
        for address, predicate, name, operands in INSTRUCTION.findall(sass)
    ]


def fingerprint(code: list[tuple[int, str, str, str]]) -> str:
    """Returns a hash of the instructions; equal machine code has equal hashes."""
    return hashlib.sha256(repr(code).encode()).hexdigest()[:16]


def loop_spills(code: list[tuple[int, str, str, str]]) -> list[int]:
    """Returns the number of spill instructions in each innermost loop that has wgmma products.

    A warp-specialised kernel has one such loop per warpgroup. A spill outside the loop costs a few
    cycles per tile; a spill inside costs cycles for every block of keys. `code` comes from
    machine_code.
    """
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
    """Compiles a variant; returns its registers, spills, shared memory and machine code hash."""
    source = (GluonASTSource if variant.kernel.is_gluon() else ASTSource)(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs=variant.constants,
        attrs=variant.attributes,
    )
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=gpu_target(target), options=variant.options)
    assembly = compiled.asm["ptx" if is_nvidia(target) else "amdgcn"]
    extra: dict[str, object] = {}
    if is_nvidia(target):
        code = machine_code(compiled)
        registers = re.findall(r"Used (\d+) registers", log.getvalue())
        extra = {"registers": max(map(int, registers)), "machine_code": fingerprint(code)}
        if not variant.multiplies:
            extra["fast_divisions"] = len(FAST_DIVISIONS.findall(assembly))
    if target == "hopper":
        extra["loop_spills"] = loop_spills(code)
        extra["barriers"] = sorted({int(number) for number in BARRIERS.findall(assembly)})
    instructions = MATRIX_INSTRUCTIONS[target]
    if target == "sm_90" and variant.name.startswith(("decode_", "dual_chunk_prefix")):
        instructions = SMALL_TILES
    return {
        "matrix_instructions": len(re.findall(instructions, assembly)),
        "tma_loads": len(TMA_LOADS.findall(assembly)),
        "spill_bytes": spill_bytes(target, compiled, log.getvalue()),
        "spill_free": variant.spill_free,
        "serialised": bool(SERIALISED.search(log.getvalue())),
        "shared_bytes": compiled.metadata.shared,
        **extra,
    }


def described(
    target: str, features: Sequence[str], head_dims: Sequence[int], groups: Sequence[int]
) -> Iterator[KernelVariant]:
    """Yields a target's variants from the ahead-of-time lists; `groups` is for "hopper" only."""
    if target == "hopper":
        from lctrain_kernels import aot_hopper as hopper_aot  # the others need no Gluon

        return hopper_aot.kernel_variants(tuple(head_dims), tuple(features), tuple(groups))
    return attention_aot.kernel_variants(target, tuple(head_dims), tuple(features))


def report(target: str, variant: KernelVariant) -> dict:
    """Returns the result of `compile_variant`, or its error message."""
    try:
        return compile_variant(target, variant)
    except Exception as error:  # the others are worth knowing about too
        return {"error": f"{type(error).__name__}: {error}"}


def main(request: dict) -> None:
    """Prints one JSON object per variant; computes all keys before anything is compiled."""
    variants = [
        (number, selection[0], variant)
        for number, selection in enumerate(request["selections"])
        for variant in described(*selection)
    ]
    lines = [
        {
            "selection": number,
            "target": target,
            "name": variant.name,
            "triton": triton.__version__,
            "multiplies": variant.multiplies,
            "key": variant_key(
                variant, "sm_90" if target == "hopper" else target, triton.__version__
            ),
        }
        for number, target, variant in variants
    ]
    known = frozenset(request["known"])
    for line, (_, target, variant) in zip(lines, variants, strict=True):
        found = {} if line["key"] in known else report(target, variant)
        print(json.dumps(line | found), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
