"""Every kernel and configuration as input for ahead-of-time compilation, without a GPU.

`triton.compile(ASTSource(fn=v.kernel, signature=v.signature, constexprs=v.constants,
attrs=v.attributes), target=..., options=v.options)` compiles a variant as the launchers do for
aligned tensors.
"""

import itertools
import math
from collections.abc import Iterator

from lctrain_kernels.differential.triton_dkv import differential_dkv_kernel
from lctrain_kernels.differential.triton_dq import differential_dq_kernel
from lctrain_kernels.differential.triton_fwd import differential_fwd_kernel
from lctrain_kernels.dual_chunk.triton_dkv import dual_chunk_dkv_kernel
from lctrain_kernels.dual_chunk.triton_dq import dual_chunk_dq_kernel
from lctrain_kernels.dual_chunk.triton_fwd import dual_chunk_fwd_kernel
from lctrain_kernels.dual_chunk.triton_rotate import ROTATE_CONFIG, dual_chunk_rotate_kernel
from lctrain_kernels.tile.config import (
    DIFFERENTIAL_OPERATIONS,
    DUAL_CHUNK_OPERATIONS,
    OPERATIONS,
    TileConfig,
    table_config,
)
from lctrain_kernels.tile.structures import Flags, tile_shape
from lctrain_kernels.tile.variant import KernelVariant, describe_variant
from lctrain_kernels.varlen.triton_dkv import varlen_dkv_kernel
from lctrain_kernels.varlen.triton_dq import varlen_dq_kernel
from lctrain_kernels.varlen.triton_fwd import varlen_fwd_kernel

KERNELS = {
    "varlen_fwd": varlen_fwd_kernel,
    "varlen_dq": varlen_dq_kernel,
    "varlen_dkv": varlen_dkv_kernel,
    "dual_chunk_fwd": dual_chunk_fwd_kernel,
    "dual_chunk_dq": dual_chunk_dq_kernel,
    "dual_chunk_dkv": dual_chunk_dkv_kernel,
    "dual_chunk_rotate": dual_chunk_rotate_kernel,
    "diff_fwd": differential_fwd_kernel,
    "diff_dq": differential_dq_kernel,
    "diff_dkv": differential_dkv_kernel,
}
# (D, value dim, whether both branches read one k) of differential attention: its versions 1 and 2,
# and what else its tables have entries for.
DIFFERENTIAL_VERSIONS = ((64, 128, False), (128, 128, True))
DIFFERENTIAL_SHAPES = (
    *DIFFERENTIAL_VERSIONS,
    (64, 64, False),
    (128, 128, False),
    (128, 256, False),
)
FEATURES = ("causal", "full", "dropout", "softcap_dropout", "all")

_POINTERS = {
    **dict.fromkeys(("inv_freq", "logit_scale"), "*fp32"),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_x"), "*i32"),
    **dict.fromkeys(("tiles", "window", "document_ids"), "*i32"),
    **dict.fromkeys(("lse", "dlse", "delta", "stats"), "*fp32"),
    **dict.fromkeys(("alibi_slopes", "learnable_sink"), "*fp32"),
    **dict.fromkeys(("lam", "dlam", "lse1", "lse2", "dlse1", "dlse2"), "*fp32"),
    "dropout_seed": "*i64",
}
_FLOATS = ("scale", "softcap", "keep_scale")


def kernel_variant(
    operation: str,
    config: TileConfig,
    head_dim: int,
    *,
    features: str = "causal",
    dtype: str = "bf16",
    group: int = 4,
    value_dim: int | None = None,
    shared_k: bool = False,
    is_share: bool = False,
) -> KernelVariant:
    """Describes one compilation.

    Args:
        operation: A key of KERNELS.
        config: Its tile configuration.
        head_dim: D.
        features: One of FEATURES; "all" adds windows from device memory, softcap, ALiBi, sinks and
            dropout.
        dtype: Triton's name of the tensors' dtype.
        group: Query heads per key/value head.
        value_dim: Of differential attention; default D.
        shared_k: Of differential attention: both branches read one k, and lam is per token.
        is_share: Of dual chunk attention: the launch whose result the other one adds to; of its
            rotation: that of keys.
    """
    value_dim = head_dim if value_dim is None else value_dim
    everything = features == "all"
    dropout = everything or "dropout" in features
    softcap = everything or "softcap" in features
    present = {
        "window": everything,
        "alibi_slopes": everything,
        "learnable_sink": everything,
        "logit_scale": everything,
        "dlse": everything,
        "dlse1": everything,
        "dlse2": everything,
        **dict.fromkeys(
            ("out", "dout", "lse", "stats"), operation != "dual_chunk_rotate" or not is_share
        ),
        "k2": not shared_k,
        "dk2": not shared_k,
        "document_ids": dropout,
        "dropout_seed": dropout,
    }
    tile = tile_shape(config, head_dim, group, value_dim)
    constants: dict[str, object] = {
        "TILE": tile._replace(pack=math.gcd(config.pack, group)),
        "FLAGS": Flags(
            has_left=everything,
            has_right=features != "full",
            has_softcap=softcap,
            has_alibi=everything,
            has_sink=everything,
            has_dropout=dropout,
        ),
        "SHARED_K": shared_k,
        "STATS": 8 if shared_k else 4,
        "IS_QUERY": not is_share,
        "IS_INTER": is_share,
        "IS_SUCC": is_share,
        "PRECISION": "ieee",
    }
    kernel = KERNELS[operation]
    groups = kernel.fn.__annotations__
    types: dict[str, object] = {
        name: "fp32" if name in _FLOATS else "i32" for name in kernel.arg_names
    }
    types["pointers"] = groups["pointers"]._make(
        _POINTERS.get(name, f"*{dtype}") if present.get(name, True) else None
        for name in groups["pointers"]._fields
    )
    types["strides"] = groups["strides"]._make("i32" for _ in groups["strides"]._fields)
    spill_free = config.spill_free and features == "causal"
    size = f"D{head_dim}" if value_dim == head_dim else f"D{head_dim}v{value_dim}"
    size += "-share" if is_share else ""
    label = f"{operation}-{size}-{features}-{dtype}-{config.block_m}x{config.block_n}"
    return describe_variant(label, kernel, types, constants, config.options, spill_free)


def kernel_variants(
    table: str,
    head_dims: tuple[int, ...] = (64, 96, 128, 256),
    features: tuple[str, ...] = FEATURES,
) -> Iterator[KernelVariant]:
    """Yields every configuration of one table of config.TABLES in bf16, and float32's table.

    Args:
        table: "sm_80", "sm_90", "sm_100", "gfx942" or "gfx950".
        head_dims: Head dims to compile; float32 takes the first.
        features: Subset of FEATURES. float32's table, and shapes of differential attention that no
            version has, are plain causal kernels: they need "causal". Where dropout has a
            configuration of its own, the plain kernel is compiled whether it is among them or not.
    """
    for operation in OPERATIONS:
        for head_dim in head_dims:
            plain = table_config(table, operation, head_dim, 4)
            drop = table_config(table, operation, head_dim, 4, has_dropout=True)
            wanted = features if plain == drop else (*features, "causal")
            for feature in dict.fromkeys(wanted):
                config = drop if feature == "all" or "dropout" in feature else plain
                yield kernel_variant(operation, config, head_dim, features=feature)
        if "causal" in features:
            config = table_config("float32", operation, head_dims[0], 4)
            yield kernel_variant(operation, config, head_dims[0], dtype="fp32")
    yield from _dual_chunk_variants(table, head_dims, features)
    yield from _differential_variants(table, head_dims, features)


def _dual_chunk_variants(
    table: str, head_dims: tuple[int, ...], features: tuple[str, ...]
) -> Iterator[KernelVariant]:
    """As kernel_variants; of the features dual chunk attention has dropout, and logit_scale.

    The launches whose result another one adds to are those of one head dim; so are, but for sm_90,
    the plain kernels where they are all that is wanted.
    """
    wanted = [name for name in ("causal", "dropout", "all") if name in features]
    for head_dim in head_dims:
        if wanted == ["causal"] and table != "sm_90" and head_dim != 128:
            continue
        for operation, feature in itertools.product(DUAL_CHUNK_OPERATIONS, wanted):
            drop = feature != "causal"
            one_launch = operation == "dual_chunk_fwd" or head_dim != 128
            for is_share in (False,) if one_launch else (False, True):
                config = table_config(
                    table, operation, head_dim, 4, has_dropout=drop, is_share=is_share
                )
                yield kernel_variant(
                    operation, config, head_dim, features=feature, is_share=is_share
                )
        share = head_dim == 128
        yield kernel_variant(
            "dual_chunk_rotate",
            ROTATE_CONFIG,
            head_dim,
            features="causal" if share else "all",
            is_share=share,
        )
    if "causal" not in features:
        return
    for operation in DUAL_CHUNK_OPERATIONS:
        config = table_config("float32", operation, head_dims[0], 4)
        yield kernel_variant(operation, config, head_dims[0], dtype="fp32")


def _differential_variants(
    table: str, head_dims: tuple[int, ...], features: tuple[str, ...]
) -> Iterator[KernelVariant]:
    """As kernel_variants; all shapes but version 1's are compiled as plain causal kernels."""
    plain = "causal" in features
    for operation in DIFFERENTIAL_OPERATIONS:
        for shape in DIFFERENTIAL_SHAPES if plain else DIFFERENTIAL_VERSIONS:
            head_dim, value_dim, shared_k = shape
            group = 2 if shared_k else 1
            if head_dim not in head_dims:
                continue
            for feature in features if shape == DIFFERENTIAL_VERSIONS[0] else ("causal",):
                if feature == "softcap_dropout":
                    continue
                dropout = feature in ("all", "dropout")
                config = table_config(
                    table, operation, head_dim, group, dropout, value_dim, shared_k
                )
                yield kernel_variant(
                    operation,
                    config,
                    head_dim,
                    features=feature,
                    group=group,
                    value_dim=value_dim,
                    shared_k=shared_k,
                )
        if plain:
            config = table_config("float32", operation, 32, 1, value_dim=32)
            yield kernel_variant(operation, config, 32, dtype="fp32", group=1)
