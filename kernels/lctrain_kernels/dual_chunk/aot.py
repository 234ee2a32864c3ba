"""Lists the portable kernels of dual chunk attention that CI compiles ahead of time."""

import itertools
from collections.abc import Iterator

from lctrain_kernels.decode import aot as decode_aot
from lctrain_kernels.decode.launch import MERGE_WARPS
from lctrain_kernels.decode.launch_config import table_config as decode_config
from lctrain_kernels.dual_chunk.prefix_launch import BY_RANGE, MERGE_ALL
from lctrain_kernels.dual_chunk.triton_dkv import dual_chunk_dkv_kernel
from lctrain_kernels.dual_chunk.triton_dq import dual_chunk_dq_kernel
from lctrain_kernels.dual_chunk.triton_fwd import dual_chunk_fwd_kernel
from lctrain_kernels.dual_chunk.triton_prefix import dual_chunk_prefix_kernel
from lctrain_kernels.dual_chunk.triton_rotate import ROTATE_CONFIG, dual_chunk_rotate_kernel
from lctrain_kernels.tile.attention_variant import OFFSET_HEAD_DIM, attention_variant
from lctrain_kernels.tile.config import DUAL_CHUNK_OPERATIONS, TileConfig, table_config
from lctrain_kernels.tile.variant import KernelVariant

KERNELS = {
    "dual_chunk_fwd": dual_chunk_fwd_kernel,
    "dual_chunk_dq": dual_chunk_dq_kernel,
    "dual_chunk_dkv": dual_chunk_dkv_kernel,
    "dual_chunk_rotate": dual_chunk_rotate_kernel,
    "dual_chunk_prefix": dual_chunk_prefix_kernel,
}
_FEATURES = ("causal", "dropout", "offset_dropout", "all")
_STATISTICS = ("out", "dout", "lse", "stats")  # of queries; the rotation of keys has none


def _variant(
    operation: str,
    config: TileConfig,
    head_dim: int,
    *,
    features: str = "causal",
    dtype: str = "bf16",
    is_partial: bool = False,
    rotates_keys: bool = False,
) -> KernelVariant:
    """Describes one compilation of a portable dual chunk kernel.

    Args:
        operation: Name of the kernel, a key of KERNELS.
        config: Tile configuration of the kernel.
        head_dim: Head dim D of queries and keys.
        features: "causal", "dropout", "offset_dropout" or "all" (dropout and logit_scale).
        dtype: Triton's name of the tensors' dtype, such as "bf16".
        is_partial: Whether a later launch adds to the result of this one.
        rotates_keys: Whether dual_chunk_rotate_kernel rotates keys, for which it computes no
            statistics; otherwise it rotates queries.
    """
    return attention_variant(
        operation,
        KERNELS[operation],
        config,
        head_dim,
        features=features,
        dtype=dtype,
        constants={"IS_QUERY": not rotates_keys, "IS_INTER": is_partial, "IS_SUCC": is_partial},
        absent=_STATISTICS if rotates_keys else (),
        note="-partial" if is_partial else "-keys" if rotates_keys else "",
        multiplies=operation != "dual_chunk_rotate",
    )


def prefix_variants(table: str, head_dim: int) -> Iterator[KernelVariant]:
    """Yields the variants of dual_chunk_prefix_kernel, with each of its tiles, and of its merge.

    Args:
        table: Name of the architecture's table.
        head_dim: Head dim D.
    """
    config, case = decode_config(table, head_dim), decode_aot.SHARED
    for tile in (config.tile, *config.shared_tiles):
        yield decode_aot.describe(
            "dual_chunk_prefix",
            case,
            head_dim,
            tile,
            function=KERNELS["dual_chunk_prefix"],
            flags=BY_RANGE,
            absent=("out", "lse", "seqlens", "prefix", "work"),
            prefetch=config.prefetch_pages,
        )
    yield decode_aot.describe(
        "decode_merge",
        case,
        head_dim,
        config.tile,
        constants={"ROWS": config.merge_rows, "UNROLL": config.merge_unroll},
        options={"num_warps": MERGE_WARPS, "enable_fp_fusion": True},
        flags=MERGE_ALL,
        wide=True,
        note="-prefixes",
    )


def kernel_variants(
    table: str, head_dims: tuple[int, ...], features: tuple[str, ...]
) -> Iterator[KernelVariant]:
    """Yields the variants of the dual chunk kernels to compile for one architecture.

    The arguments are those of `lctrain_kernels.aot.kernel_variants`. Launches of partial results
    are compiled for head dim 128 only. If "causal" is the only feature, plain kernels are also
    compiled for head dim 128 only, except on sm_90.
    """
    wanted = [name for name in _FEATURES if name in features]
    for head_dim in head_dims:
        if wanted == ["causal"] and table != "sm_90" and head_dim != 128:
            continue
        for operation, feature in itertools.product(DUAL_CHUNK_OPERATIONS, wanted):
            drop, offsets = feature != "causal", feature == "offset_dropout"
            if offsets and head_dim != OFFSET_HEAD_DIM:
                continue
            one_launch = operation == "dual_chunk_fwd" or head_dim != 128 or offsets
            for is_partial in (False,) if one_launch else (False, True):
                config = table_config(
                    table, operation, head_dim, 4, has_dropout=drop, is_partial=is_partial
                )
                yield _variant(operation, config, head_dim, features=feature, is_partial=is_partial)
        rotates_keys = head_dim == 128
        yield _variant(
            "dual_chunk_rotate",
            ROTATE_CONFIG,
            head_dim,
            features="causal" if rotates_keys else "all",
            rotates_keys=rotates_keys,
        )
    if "causal" not in features:
        return
    for head_dim in head_dims if table == "sm_90" else (128,):
        yield from prefix_variants(table, head_dim)
    for operation in DUAL_CHUNK_OPERATIONS:
        config = table_config("float32", operation, head_dims[0], 4)
        yield _variant(operation, config, head_dims[0], dtype="fp32")
