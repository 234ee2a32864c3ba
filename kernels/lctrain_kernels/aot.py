"""Lists every compilation (variant) of the portable Triton kernels that CI makes ahead of time.

Each operation's folder has a list of its own, `aot.py`; this module joins the lists. Compiling
needs no GPU:
`triton.compile(ASTSource(fn=v.kernel, signature=v.signature, constexprs=v.constants,
attrs=v.attributes), target=..., options=v.options)` compiles a variant as the launchers do for
aligned tensors.
"""

from collections.abc import Iterator
from dataclasses import replace

from lctrain_kernels.cross_entropy import aot as cross_entropy
from lctrain_kernels.decode import aot as decode
from lctrain_kernels.differential import aot as differential
from lctrain_kernels.dual_chunk import aot as dual_chunk
from lctrain_kernels.linear import aot as linear
from lctrain_kernels.mlp import aot as mlp
from lctrain_kernels.norm import aot as norm
from lctrain_kernels.rotary import aot as rotary
from lctrain_kernels.sampling import aot as sampling
from lctrain_kernels.tile.attention_variant import FEATURES
from lctrain_kernels.tile.variant import KernelVariant
from lctrain_kernels.varlen import aot as varlen

ATTENTIONS = (varlen, dual_chunk, differential, decode)
FUSED = (norm, rotary, mlp, cross_entropy, linear, sampling)
KERNELS = {name: kernel for module in ATTENTIONS for name, kernel in module.KERNELS.items()}
"""Attention kernels by name."""


def kernel_variants(
    table: str,
    head_dims: tuple[int, ...] = (64, 96, 128, 256),
    features: tuple[str, ...] = FEATURES,
) -> Iterator[KernelVariant]:
    """Yields the kernel variants of one architecture: attention and fused operations.

    Attention is compiled with every configuration in bf16, and once in float32.

    Args:
        table: Architecture: "sm_80", "sm_90", "sm_100", "gfx942" or "gfx950".
        head_dims: Head dims of attention to compile; float32 takes only the first.
        features: Subset of FEATURES; float32 is compiled only if "causal" is among them. Fused
            operations have no features and one table for all GPUs: "sm_90" compiles all of their
            variants, every other architecture compiles one variant per kernel.
    """
    for attention in ATTENTIONS:
        yield from attention.kernel_variants(table, head_dims, features)
    fused = [variant for operation in FUSED for variant in operation.kernel_variants()]
    first = {variant.kernel.fn: variant for variant in reversed(fused)}
    if table == "sm_90":
        yield from fused
    else:  # the tiles are tuned for sm_90: elsewhere registers may spill
        yield from (replace(variant, spill_free=False) for variant in first.values())
