"""Prints a hash of the assembly of every ahead-of-time variant, without running ptxas.

`assembly_of.py REQUEST` takes {"selections": [...]} like aot_compile.py. It uses the Triton and the
source tree that come first on PYTHONPATH. Assembly is PTX for NVIDIA, and machine assembly for AMD.
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
from tests.kernels.aot_key import variant_key


def assembly(target: str, variant: KernelVariant) -> str:
    """Returns a variant's assembly as text, without comments and with a neutral kernel name."""
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
    """Prints one JSON object per variant of the request."""
    CUDABackend.make_cubin = lambda *_, **__: b""
    variants = {
        (selection[0], variant.name): variant
        for selection in request["selections"]
        for variant in described(*selection)
    }
    gpus = {target: "sm_90" if target == "hopper" else target for target, _ in variants}
    keys = {  # of all variants, before a compiler runs, as in aot_compile.py
        (target, name): variant_key(variant, gpus[target], triton.__version__)
        for (target, name), variant in variants.items()
    }
    for (target, name), variant in variants.items():
        if not re.search(request.get("only", ""), name):
            continue
        try:
            digest = hashlib.sha256(assembly(target, variant).encode()).hexdigest()[:16]
        except Exception as error:  # the others are worth knowing about too
            digest = f"{type(error).__name__}: {error}"
        line = {"target": target, "name": name, "key": keys[target, name], "assembly": digest}
        print(json.dumps(line | {"spill_free": variant.spill_free}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
