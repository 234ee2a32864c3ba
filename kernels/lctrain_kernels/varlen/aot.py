"""Lists the portable kernels of varlen attention that CI compiles ahead of time, without a GPU."""

from collections.abc import Iterator

from lctrain_kernels.tile.attention_variant import (
    OFFSET_HEAD_DIM,
    attention_variant,
    has_dropout,
)
from lctrain_kernels.tile.config import OPERATIONS, table_config
from lctrain_kernels.tile.variant import KernelVariant
from lctrain_kernels.varlen.triton_dkv import varlen_dkv_kernel
from lctrain_kernels.varlen.triton_dq import varlen_dq_kernel
from lctrain_kernels.varlen.triton_fwd import varlen_fwd_kernel

KERNELS = {
    "varlen_fwd": varlen_fwd_kernel,
    "varlen_dq": varlen_dq_kernel,
    "varlen_dkv": varlen_dkv_kernel,
}


def kernel_variants(
    table: str, head_dims: tuple[int, ...], features: tuple[str, ...]
) -> Iterator[KernelVariant]:
    """Yields the variants of the forward, dq and dk, dv kernels to compile for one architecture.

    The arguments are those of `lctrain_kernels.aot.kernel_variants`. If an operation has another
    tile configuration with dropout, its kernel without dropout is compiled even if "causal" is not
    among the features.
    """
    for operation in OPERATIONS:
        kernel = KERNELS[operation]
        for head_dim in head_dims:
            plain = table_config(table, operation, head_dim, 4)
            drop = table_config(table, operation, head_dim, 4, has_dropout=True)
            wanted = features if plain == drop else (*features, "causal")
            for name in dict.fromkeys(wanted):
                if name == "offset_dropout" and head_dim != OFFSET_HEAD_DIM:
                    continue
                config = drop if has_dropout(name) else plain
                yield attention_variant(operation, kernel, config, head_dim, features=name)
        if "causal" in features:
            config = table_config("float32", operation, head_dims[0], 4)
            yield attention_variant(operation, kernel, config, head_dims[0], dtype="fp32")
