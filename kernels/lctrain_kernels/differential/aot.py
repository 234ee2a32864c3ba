"""Lists the portable kernels of differential attention that CI compiles ahead of time."""

from collections.abc import Iterator

from lctrain_kernels.differential.triton_dkv import differential_dkv_kernel
from lctrain_kernels.differential.triton_dq import differential_dq_kernel
from lctrain_kernels.differential.triton_fwd import differential_fwd_kernel
from lctrain_kernels.tile.attention_variant import attention_variant, has_dropout
from lctrain_kernels.tile.config import DIFFERENTIAL_OPERATIONS, TileConfig, table_config
from lctrain_kernels.tile.variant import KernelVariant

KERNELS = {
    "diff_fwd": differential_fwd_kernel,
    "diff_dq": differential_dq_kernel,
    "diff_dkv": differential_dkv_kernel,
}
Shape = tuple[int, int, bool]
"""Head dim D, head dim Dv of the values, and whether both branches read one k."""
VERSIONS: tuple[Shape, ...] = ((64, 128, False), (128, 128, True))
"""The published versions 1 and 2."""
SHAPES: tuple[Shape, ...] = (*VERSIONS, (64, 64, False), (128, 128, False), (128, 256, False))
"""All shapes that the tile tables list."""


def _variant(
    operation: str, config: TileConfig, shape: Shape, group: int, *, features: str, dtype: str
) -> KernelVariant:
    head_dim, value_dim, shared_k = shape
    return attention_variant(
        operation,
        KERNELS[operation],
        config,
        head_dim,
        features=features,
        dtype=dtype,
        group=group,
        value_dim=value_dim,
        constants={"SHARED_K": shared_k, "STATS": 8 if shared_k else 4},
        absent=("k2", "dk2") if shared_k else (),
    )


def kernel_variants(
    table: str, head_dims: tuple[int, ...], features: tuple[str, ...]
) -> Iterator[KernelVariant]:
    """Yields the variants of the differential attention kernels to compile for one architecture.

    The arguments are those of `lctrain_kernels.aot.kernel_variants`. Only shapes of version 1
    (values of head dim 2 D, one k per branch) are compiled with all features. All other shapes are
    compiled as plain causal kernels; shapes of neither version only if "causal" is among the
    features.
    """
    plain = "causal" in features
    for operation in DIFFERENTIAL_OPERATIONS:
        for shape in SHAPES if plain else VERSIONS:
            head_dim, value_dim, shared_k = shape
            group = 2 if shared_k else 1
            if head_dim not in head_dims:
                continue
            for name in features if shape == VERSIONS[0] else ("causal",):
                if name == "softcap_dropout":
                    continue
                config = table_config(
                    table, operation, head_dim, group, has_dropout(name), value_dim, shared_k
                )
                yield _variant(operation, config, shape, group, features=name, dtype="bf16")
        if plain:
            config = table_config("float32", operation, 32, 1, value_dim=32)
            yield _variant(operation, config, (32, 32, False), 1, features="causal", dtype="fp32")
