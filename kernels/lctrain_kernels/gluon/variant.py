"""Types and constants of the Hopper kernels' arguments, to compile them without a GPU."""

import torch
import triton
from triton.runtime.jit import mangle_type

from lctrain_kernels.gluon.launch import ragged_descriptor
from lctrain_kernels.tile.structures import Flags

FEATURES = ("causal", "full", "dropout", "offset_dropout", "deterministic", "all")
"""What a variant computes; "all" adds windows from device memory, softcap, sinks and dropout,
"deterministic" differs in the backward, "offset_dropout" has query offsets and a first head."""
HEADS_KV = 8
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # Triton 3.10 flips the default of fusion

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_POINTERS = {
    **dict.fromkeys(("lse", "lse1", "lse2", "delta", "stats", "lam"), "*fp32"),
    **dict.fromkeys(("dq_sum", "dk_sum", "dv_sum"), "*fp32"),
    **dict.fromkeys(("learnable_sink", "logit_scale"), "*fp32"),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "tiles", "counter", "semaphores"), "*i32"),
    **dict.fromkeys(("window", "document_ids", "query_offsets"), "*i32"),
    "dropout_seed": "*i64",
}
_FLOATS = ("scale", "softcap", "keep_scale")


def descriptor_type(dtype: str, rows: int, columns: int) -> str:
    """Returns Triton's name of the type of a TMA descriptor from ragged_descriptor.

    Args:
        dtype: Triton's name of the tensor's dtype, such as "bf16".
        rows: Rows of a tile.
        columns: Columns of a tile.
    """
    rows_of_heads = torch.empty((1, 1, columns), dtype=_DTYPES[dtype])
    return mangle_type(ragged_descriptor(rows_of_heads, rows, columns))


def has_dropout(features: str) -> bool:
    return features in ("dropout", "offset_dropout", "all")


def attention_flags(features: str, has_sink: bool = False) -> Flags:
    """Returns the Flags of a varlen or differential kernel for `features`, an entry of FEATURES."""
    everything = features == "all"
    return Flags(
        has_left=everything,
        has_right=features != "full",
        has_softcap=everything,
        has_sink=has_sink and everything,
        has_dropout=has_dropout(features),
    )


def argument_types(
    kernel: triton.JITFunction,
    features: str,
    dtype: str,
    absent: tuple[str, ...] = (),
    /,
    **descriptors: str | None,
) -> dict[str, object]:
    """Returns Triton's names of the types of a Hopper kernel's arguments, for one variant.

    Args:
        kernel: Kernel whose arguments are typed.
        features: Name of the set of features to compile, one of FEATURES.
        dtype: Triton's name of the tensors' dtype, such as "bf16".
        absent: Names of further pointers that are None.
        descriptors: Argument name of each TMA descriptor -> its type.
    """
    if features != "all":
        absent = (*absent, "window", "learnable_sink", "logit_scale")
    if not has_dropout(features):
        absent = (*absent, "dropout_seed", "document_ids")
    if features != "offset_dropout":
        absent = (*absent, "query_offsets", "first_head")
    types: dict[str, object] = {
        name: "fp32" if name in _FLOATS else None if name in absent else "i32"
        for name in kernel.arg_names
    }
    pointers = kernel.fn.__annotations__["pointers"]
    types["pointers"] = pointers._make(
        None if name in absent else _POINTERS.get(name, f"*{dtype}") for name in pointers._fields
    )
    if "strides" in kernel.fn.__annotations__:
        strides = kernel.fn.__annotations__["strides"]
        types["strides"] = strides._make("i32" for _ in strides._fields)
    return types | descriptors
