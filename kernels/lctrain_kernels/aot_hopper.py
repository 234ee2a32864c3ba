"""Every Hopper kernel and tile as input for ahead-of-time compilation, without a GPU.

Each operation's folder has its own list, `aot_hopper.py`; this module joins them.
`triton.compile(GluonASTSource(fn=v.kernel, signature=v.signature, constexprs=v.constants,
attrs=v.attributes), target=GPUTarget("cuda", 90, 32), options=v.options)` compiles a variant as the
launchers do for aligned tensors. The tests hold the two together.
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
    """Yields every tile of gluon/config.py in bf16, and each plain causal kernel once in fp16.

    Args:
        head_dims: Head dims to compile, of passes that the Hopper kernels serve.
        features: Subset of FEATURES. Without "full", differential attention is that of its two
            published versions.
        groups: Query heads per key/value head. The forward packs them; the backward loops over
            them, so it takes the last.
    """
    for attention in (varlen, dual_chunk, differential):
        yield from attention.kernel_variants(head_dims, features, groups)
