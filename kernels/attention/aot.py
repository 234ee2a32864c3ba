"""Every kernel and configuration as input for ahead-of-time compilation, without a GPU.

`triton.compile(ASTSource(fn=v.kernel, signature=v.signature, constexprs=v.constants,
attrs=v.attributes), target=..., options=v.options)` compiles a variant as the launchers do for
aligned tensors.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import triton

from lctrain.kernels.attention.config import OPERATIONS, TileConfig, table_config
from lctrain.kernels.attention.launch import RUNTIME_INTEGERS, padded_head_dim
from lctrain.kernels.attention.varlen_dkv import varlen_dkv_kernel
from lctrain.kernels.attention.varlen_dq import varlen_dq_kernel
from lctrain.kernels.attention.varlen_fwd import varlen_fwd_kernel

KERNELS = {
    "varlen_fwd": varlen_fwd_kernel,
    "varlen_dq": varlen_dq_kernel,
    "varlen_dkv": varlen_dkv_kernel,
}
FEATURES = ("causal", "full", "dropout", "softcap_dropout", "all")

_POINTERS = {
    **dict.fromkeys(("cu_q", "cu_k", "tiles", "window", "document_ids"), "*i32"),
    **dict.fromkeys(("lse", "dlse", "delta", "stats", "alibi", "sink"), "*fp32"),
    "seed": "*i64",
}
_FLOATS = ("scale", "softcap", "keep_scale")


@dataclass(frozen=True)
class KernelVariant:
    """One compilation: the arguments of ASTSource and the compiler's options."""

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, int]
    spill_free: bool


def kernel_variant(
    operation: str,
    config: TileConfig,
    head_dim: int,
    *,
    features: str = "causal",
    dtype: str = "bf16",
    group: int = 4,
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
    """
    everything = features == "all"
    dropout = everything or "dropout" in features
    softcap = everything or "softcap" in features
    present = {
        "window": everything,
        "alibi": everything,
        "sink": everything,
        "dlse": everything,
        "document_ids": dropout,
        "seed": dropout,
    }
    constants: dict[str, object] = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "GROUP": group,
        "PACK": math.gcd(config.pack, group),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "HAS_LEFT": everything,
        "HAS_RIGHT": features != "full",
        "HAS_SOFTCAP": softcap,
        "HAS_ALIBI": everything,
        "HAS_SINK": everything,
        "HAS_DROPOUT": dropout,
        "PRECISION": "ieee",
    }
    kernel = KERNELS[operation]
    signature: dict[str, str] = {}
    values: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for index, name in enumerate(kernel.arg_names):
        stem = name.removesuffix("_ptr")
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
        elif name.endswith("_ptr") and not present.get(stem, True):
            signature[name], values[(index,)] = "constexpr", None
        elif name.endswith("_ptr"):
            signature[name] = _POINTERS.get(stem, f"*{dtype}")
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in _FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name not in RUNTIME_INTEGERS:
                attributes[(index,)] = [["tt.divisibility", 16]]
    spill_free = config.spill_free and features == "causal"
    label = f"{operation}-D{head_dim}-{features}-{dtype}-{config.block_m}x{config.block_n}"
    return KernelVariant(label, kernel, signature, values, attributes, config.options, spill_free)


def kernel_variants(
    table: str,
    head_dims: tuple[int, ...] = (64, 96, 128, 256),
    features: tuple[str, ...] = FEATURES,
) -> Iterator[KernelVariant]:
    """Yields every configuration of one table of config.TABLES in bf16, and float32's table.

    Args:
        table: "sm_80", "sm_90", "sm_100", "gfx942" or "gfx950".
        head_dims: Head dims to compile; float32 takes the first.
        features: Subset of FEATURES. Where dropout has a configuration of its own, the plain
            causal kernel is compiled whether it is among them or not.
    """
    for operation in OPERATIONS:
        for head_dim in head_dims:
            plain = table_config(table, operation, head_dim, 4)
            drop = table_config(table, operation, head_dim, 4, has_dropout=True)
            wanted = features if plain == drop else (*features, "causal")
            for feature in dict.fromkeys(wanted):
                config = drop if feature == "all" or "dropout" in feature else plain
                yield kernel_variant(operation, config, head_dim, features=feature)
        config = table_config("float32", operation, head_dims[0], 4)
        yield kernel_variant(operation, config, head_dims[0], dtype="fp32")
