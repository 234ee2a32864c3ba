"""Describes one compilation of a portable attention kernel for the ahead-of-time checks.

CI compiles these variants without a GPU.
"""

import math
from collections.abc import Mapping

import triton

from lctrain_kernels.tile.config import TileConfig
from lctrain_kernels.tile.structures import Flags, tile_shape
from lctrain_kernels.tile.variant import KernelVariant, describe_variant

FEATURES = ("causal", "full", "dropout", "offset_dropout", "softcap_dropout", "all")
"""What a variant computes; "all" adds windows from device memory, softcap, ALiBi slopes, sinks,
gradients of lse and dropout. "offset_dropout" has query offsets and a first head, as ranks of
context parallelism pass them. It is compiled for one head dim of each kernel."""
OFFSET_HEAD_DIM = 128
"""Head dim of varlen and dual chunk attention for which "offset_dropout" is compiled."""

_POINTERS = {
    **dict.fromkeys(("inv_freq", "logit_scale"), "*fp32"),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_x"), "*i32"),
    **dict.fromkeys(("tiles", "window", "document_ids", "query_offsets"), "*i32"),
    **dict.fromkeys(("lse", "dlse", "delta", "stats"), "*fp32"),
    **dict.fromkeys(("alibi_slopes", "learnable_sink"), "*fp32"),
    **dict.fromkeys(("lam", "dlam", "lse1", "lse2", "dlse1", "dlse2"), "*fp32"),
    "dropout_seed": "*i64",
}
_ONLY_ALL = (
    "window",
    "alibi_slopes",
    "learnable_sink",
    "logit_scale",
    "dlse",
    "dlse1",
    "dlse2",
)
_ONLY_DROPOUT = ("document_ids", "dropout_seed")
_ONLY_OFFSETS = ("query_offsets", "first_head")
_FLOATS = ("scale", "softcap", "keep_scale")


def has_dropout(features: str) -> bool:
    """Returns whether kernels compiled with `features`, an entry of FEATURES, have dropout."""
    return features == "all" or "dropout" in features


def attention_variant(
    operation: str,
    kernel: triton.JITFunction,
    config: TileConfig,
    head_dim: int,
    *,
    features: str = "causal",
    dtype: str = "bf16",
    group: int = 4,
    value_dim: int | None = None,
    constants: Mapping[str, object] | None = None,
    absent: tuple[str, ...] = (),
    note: str = "",
    multiplies: bool = True,
) -> KernelVariant:
    """Describes one compilation of a portable attention kernel.

    Args:
        operation: Name of the kernel in the tile table.
        kernel: Kernel to compile.
        config: Tile configuration of the kernel.
        head_dim: Head dim D of queries and keys.
        features: Features of the call that the kernel compiles, one of FEATURES.
        dtype: Triton's name of the tensors' dtype, such as "bf16".
        group: Number of query heads per key/value head.
        value_dim: Head dim Dv of the values; head_dim by default.
        constants: Values of the kernel's constexprs besides tile, flags and precision.
        absent: Names of pointers that this variant does not pass, whatever its features.
        note: Text that is appended to the size in the variant's name.
        multiplies: Whether the kernel has matrix products.
    """
    value_dim = head_dim if value_dim is None else value_dim
    everything, dropout = features == "all", has_dropout(features)
    if not everything:
        absent = (*absent, *_ONLY_ALL)
    if not dropout:
        absent = (*absent, *_ONLY_DROPOUT)
    if features != "offset_dropout":
        absent = (*absent, *_ONLY_OFFSETS)
    tile = tile_shape(config, head_dim, group, value_dim)
    values: dict[str, object] = {
        "TILE": tile._replace(pack=math.gcd(config.pack, group)),
        "FLAGS": Flags(
            has_left=everything,
            has_right=features != "full",
            has_softcap=everything or "softcap" in features,
            has_alibi=everything,
            has_sink=everything,
            has_dropout=dropout,
        ),
        "PRECISION": "ieee",
        **(constants or {}),
    }
    groups = kernel.fn.__annotations__
    types: dict[str, object] = {
        name: "fp32" if name in _FLOATS else None if name in absent else "i32"
        for name in kernel.arg_names
    }
    types["pointers"] = groups["pointers"]._make(
        None if name in absent else _POINTERS.get(name, f"*{dtype}")
        for name in groups["pointers"]._fields
    )
    types["strides"] = groups["strides"]._make("i32" for _ in groups["strides"]._fields)
    size = f"D{head_dim}" if value_dim == head_dim else f"D{head_dim}v{value_dim}"
    label = f"{operation}-{size}{note}-{features}-{dtype}-{config.block_m}x{config.block_n}"
    spill_free = config.spill_free and features == "causal"
    return describe_variant(label, kernel, types, values, config.options, spill_free, multiplies)
