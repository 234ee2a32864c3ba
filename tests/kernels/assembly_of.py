"""Prints a hash of the assembly of every variant, without running ptxas.

`assembly_of.py REQUEST` takes {"selections": [...]} as aot_compile.py does, and runs on whichever
Triton and whichever tree come first on PYTHONPATH. PTX for NVIDIA, machine assembly for AMD.
"""

import hashlib
import json
import os
import re
import sys

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # lines and paths of the source are no code
os.environ["TRITON_ALWAYS_COMPILE"] = "1"

import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from lctrain_kernels.tile.variant import KernelVariant
from tests.kernels.aot_compile import described, gpu_target


def assembly(target: str, variant: KernelVariant) -> str:
    """Returns what the compiler hands to the assembler, less the kernel's name and comments."""
    source = (GluonASTSource if variant.kernel.is_gluon() else ASTSource)(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs=variant.constants,
        attrs=variant.attributes,
    )
    compiled = triton.compile(source, target=gpu_target(target), options=variant.options)
    text = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    text = text.replace(variant.kernel.fn.__name__, "kernel")
    return re.sub(r"(?m)^\s*(//|;|\.file|\.ident).*$", "", text)


def main(request: dict) -> None:
    """Prints a line for every variant."""
    CUDABackend.make_cubin = lambda *_, **__: b""
    seen = set()
    for selection in request["selections"]:
        for variant in described(*selection):
            place = (selection[0], variant.name)
            if place in seen or not re.search(request.get("only", ""), variant.name):
                continue
            seen.add(place)
            try:
                digest = hashlib.sha256(assembly(selection[0], variant).encode()).hexdigest()[:16]
            except Exception as error:  # the others are worth knowing about too
                digest = f"{type(error).__name__}: {error}"
            line = {"target": selection[0], "name": variant.name, "assembly": digest}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
