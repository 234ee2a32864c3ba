"""Lists every compilation (variant) of the Hopper kernels that CI makes ahead of time.

Each operation's folder has a list of its own, `aot_hopper.py`; this module joins the lists.
Compiling needs no GPU:
`triton.compile(GluonASTSource(fn=v.kernel, signature=v.signature, constexprs=v.constants,
attrs=v.attributes), target=GPUTarget("cuda", 90, 32), options=v.options)` compiles a variant as the
launchers do for aligned tensors. A test checks that they agree.
"""

from collections.abc import Iterator

from lctrain_kernels.differential import aot_hopper as differential
from lctrain_kernels.dual_chunk import aot_hopper as dual_chunk
from lctrain_kernels.gluon.variant import FEATURES
from lctrain_kernels.tile.variant import KernelVariant
from lctrain_kernels.varlen import aot_hopper as varlen


def kernel_variants(
    head_dims: tuple[int, ...] = (64, 96, 128, 256),
    features: tuple[str, ...] = FEATURES,
    groups: tuple[int, ...] = (1, 2, 4),
) -> Iterator[KernelVariant]:
    """Yields the variants of all Hopper kernels: every tile in bf16, the plain causal ones in fp16.

    Args:
        head_dims: Head dims to compile. A pass without a Hopper kernel for a head dim is skipped.
        features: Subset of FEATURES. Without "full", only the two published versions of
            differential attention are compiled.
        groups: Numbers of query heads per key/value head. The forward is compiled for each. The
            backward is compiled for the last one only, because it loops over the query heads.
    """
    for attention in (varlen, dual_chunk, differential):
        yield from attention.kernel_variants(head_dims, features, groups)
