"""Every Hopper kernel and tile as input for ahead-of-time compilation, without a GPU.

`triton.compile(GluonASTSource(fn=v.kernel, signature=v.signature, constexprs=v.constants,
attrs=v.attributes), target=GPUTarget("cuda", 90, 32), options=v.options)` compiles a variant as the
launchers do for aligned tensors. The tests hold the two together.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
from triton.runtime.jit import mangle_type

from lctrain_kernels.differential.hopper_bwd import differential_bwd_hopper_kernel
from lctrain_kernels.differential.hopper_fwd import differential_fwd_hopper_kernel
from lctrain_kernels.dual_chunk.hopper_bwd import dual_chunk_bwd_hopper_kernel
from lctrain_kernels.dual_chunk.hopper_fwd import dual_chunk_fwd_hopper_kernel
from lctrain_kernels.dual_chunk.ranges import INTER, INTRA, SUCC
from lctrain_kernels.gluon.config import (
    BLOCK_N_BACKWARD,
    CONSUMERS,
    DIFFERENTIAL_COLUMNS,
    REGISTERS,
    backward_shape,
    backward_tile,
    differential_backward_tile,
    differential_forward_tile,
    dual_chunk_backward_tile,
    dual_chunk_forward_tile,
    entry_registers,
    forward_shape,
    forward_tile,
    pack_heads,
)
from lctrain_kernels.gluon.launch import padded_columns, ragged_descriptor
from lctrain_kernels.gluon.support import (
    BACKWARD_LIMITS,
    DIFFERENTIAL_BACKWARD_LIMITS,
    DUAL_CHUNK_BACKWARD_LIMITS,
    Call,
    DifferentialCall,
    refusal,
)
from lctrain_kernels.tile.structures import Flags
from lctrain_kernels.tile.variant import KernelVariant, describe_variant
from lctrain_kernels.varlen.hopper_bwd import varlen_bwd_hopper_kernel
from lctrain_kernels.varlen.hopper_fwd import varlen_fwd_hopper_kernel

FEATURES = ("causal", "full", "dropout", "deterministic", "all")
DUAL_CHUNK_FEATURES = ("causal", "dropout", "all")
DUAL_CHUNK_RELATIONS = {SUCC.value: "succ", INTRA.value: "intra", INTER.value: "inter"}
HEADS_KV = 8
DIFFERENTIAL_PUBLISHED = ((64, 128, False), (128, 128, True))  # D, Dv, one k
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # Triton 3.10 flips the default of fusion

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_POINTERS = {
    **dict.fromkeys(("lse", "lse1", "lse2", "delta", "stats", "lam"), "*fp32"),
    **dict.fromkeys(("dq_sum", "dk_sum", "dv_sum"), "*fp32"),
    **dict.fromkeys(("learnable_sink", "logit_scale"), "*fp32"),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "tiles", "counter", "semaphores"), "*i32"),
    **dict.fromkeys(("window", "document_ids"), "*i32"),
    "dropout_seed": "*i64",
}
_FLOATS = ("scale", "softcap", "keep_scale")


def forward_variant(
    head_dim: int, *, features: str = "causal", dtype: str = "bf16", group: int = 4
) -> KernelVariant:
    """Describes one compilation of varlen_fwd_hopper_kernel.

    Args:
        head_dim: D.
        features: One of FEATURES; "all" adds windows from device memory, softcap, sinks and
            dropout; "deterministic" differs in the backward.
        dtype: Triton's name of the tensors' dtype.
        group: Query heads per key/value head.
    """
    columns, pack = padded_columns(head_dim), pack_heads(group)
    tile = forward_tile(columns, pack, _has_dropout(features))
    rows = _descriptor(dtype, min(64, tile.consumers * 64 // pack), 64)
    keys = _descriptor(dtype, tile.block_n, columns)
    constants = {
        "TILE": forward_shape(tile, columns, group, HEADS_KV * group, pack),
        "FLAGS": _flags(features, has_sink=True),
    }
    types = _types(
        varlen_fwd_hopper_kernel,
        features,
        dtype,
        q_desc=rows,
        out_desc=rows,
        k_desc=keys,
        v_desc=keys,
    )
    options = OPTIONS | {"maxnreg": entry_registers(tile.consumers)}
    size = f"{tile.consumers * 64}x{tile.block_n}"
    label = f"hopper_fwd-D{head_dim}-g{group}-{features}-{dtype}-{size}"
    spill_free = features == "causal" and columns <= 128
    return describe_variant(label, varlen_fwd_hopper_kernel, types, constants, options, spill_free)


def backward_variant(
    head_dim: int, *, features: str = "causal", dtype: str = "bf16", group: int = 4
) -> KernelVariant:
    """As forward_variant, of varlen_bwd_hopper_kernel; sinks are not its business."""
    columns = padded_columns(head_dim)
    deterministic = features == "deterministic"
    tile = backward_tile(columns, deterministic)
    queries = _descriptor(dtype, tile.block_m, columns)
    keys = _descriptor(dtype, BLOCK_N_BACKWARD // 2, columns)
    dq = _descriptor("fp32", tile.block_m, columns // 2)
    constants = {
        "TILE": backward_shape(tile, columns, group, HEADS_KV, head_dim, deterministic),
        "FLAGS": _flags(features),
    }
    from_registers = tile.reduce_from_registers
    types = _types(
        varlen_bwd_hopper_kernel,
        features,
        dtype,
        ("semaphores", "dq") if from_registers else (),
        q_desc=queries,
        do_desc=queries,
        k_desc=keys,
        v_desc=keys,
        dq_desc=None if from_registers else dq,
    )
    options = OPTIONS | {"maxnreg": REGISTERS}
    size = f"{tile.block_m}x{BLOCK_N_BACKWARD}"
    label = f"hopper_bwd-D{head_dim}-g{group}-{features}-{dtype}-{size}"
    return describe_variant(label, varlen_bwd_hopper_kernel, types, constants, options, False)


def dual_chunk_forward_variant(
    head_dim: int, *, features: str = "causal", dtype: str = "bf16", group: int = 4
) -> KernelVariant:
    """As forward_variant, of dual_chunk_fwd_hopper_kernel; "all" adds logit_scale to dropout."""
    columns, pack = padded_columns(head_dim), pack_heads(group)
    tile = dual_chunk_forward_tile(columns)
    rows = _descriptor(dtype, min(64, CONSUMERS * 64 // pack), 64)
    keys = _descriptor(dtype, tile.block_n, columns)
    kernel = dual_chunk_fwd_hopper_kernel
    constants = {
        "TILE": forward_shape(tile, columns, group, HEADS_KV * group, pack),
        "FLAGS": Flags(has_dropout=_has_dropout(features)),
    }
    types = _types(
        kernel,
        features,
        dtype,
        q_desc=rows,
        out_desc=rows,
        k_desc=keys,
        k_succ_desc=keys,
        v_desc=keys,
    )
    options = OPTIONS | {"maxnreg": REGISTERS}
    size = f"{CONSUMERS * 64}x{tile.block_n}"
    label = f"hopper_dual_chunk_fwd-D{head_dim}-g{group}-{features}-{dtype}-{size}"
    return describe_variant(label, kernel, types, constants, options, features == "causal")


def dual_chunk_backward_variant(
    head_dim: int,
    *,
    features: str = "causal",
    dtype: str = "bf16",
    group: int = 4,
    relation: int = INTRA.value,
) -> KernelVariant:
    """As backward_variant, of one launch of dual_chunk_bwd_hopper_kernel, which has no dropout."""
    columns = padded_columns(head_dim)
    tile = dual_chunk_backward_tile(columns)
    queries = _descriptor(dtype, tile.block_m, columns)
    keys = _descriptor(dtype, BLOCK_N_BACKWARD // 2, columns)
    dq = _descriptor("fp32", tile.block_m, columns // 2)
    kernel = dual_chunk_bwd_hopper_kernel
    constants = {
        "TILE": backward_shape(tile, columns, group, HEADS_KV, head_dim),
        "RELATION": relation,
    }
    types = _types(
        kernel,
        features,
        dtype,
        ("dk", "dv") if relation == SUCC.value else (),
        q_desc=queries,
        do_desc=queries,
        k_desc=keys,
        v_desc=keys,
        dq_desc=dq,
    )
    options = OPTIONS | {"maxnreg": REGISTERS}
    size = f"{tile.block_m}x{BLOCK_N_BACKWARD}"
    name = f"hopper_dual_chunk_bwd_{DUAL_CHUNK_RELATIONS[relation]}"
    label = f"{name}-D{head_dim}-g{group}-{features}-{dtype}-{size}"
    return describe_variant(label, kernel, types, constants, options, False)


def differential_forward_variant(
    head_dim: int,
    value_dim: int,
    shared_k: bool,
    *,
    features: str = "causal",
    dtype: str = "bf16",
    group: int = 4,
) -> KernelVariant:
    """As forward_variant, of differential_fwd_hopper_kernel, which has no softcap and no sinks.

    Args:
        head_dim: D.
        value_dim: Dv.
        shared_k: Both branches read one k.
        features: As in forward_variant, like all that follow.
        dtype: Dtype of the tensors.
        group: Query heads per key/value head.
    """
    columns, value_columns = padded_columns(head_dim), padded_columns(value_dim)
    pack = pack_heads(group)
    tile = differential_forward_tile(columns, value_columns, shared_k)
    rows = _descriptor(dtype, min(64, CONSUMERS * 64 // pack), 64)
    keys = _descriptor(dtype, tile.block_n, columns)
    values = _descriptor(dtype, tile.block_n, value_columns)
    kernel = differential_fwd_hopper_kernel
    num_k = 1 if shared_k else 2
    constants = {
        "TILE": forward_shape(tile, columns, group, HEADS_KV * group, pack, value_columns, num_k),
        "FLAGS": _flags(features)._replace(has_softcap=False),
    }
    types = _types(
        kernel,
        features,
        dtype,
        **dict.fromkeys(("q1_desc", "q2_desc", "out_desc", "out1_desc", "out2_desc"), rows),
        k1_desc=keys,
        k2_desc=None if shared_k else keys,
        v_desc=values,
    )
    options = OPTIONS | {"maxnreg": REGISTERS}
    dims = f"D{head_dim}v{value_dim}-{'one_k' if shared_k else 'two_k'}"
    label = f"hopper_diff_fwd-{dims}-g{group}-{features}-{dtype}-{CONSUMERS * 64}x{tile.block_n}"
    # Values of 128 columns leave no room for all arguments; the loop at D = 64 is without spills.
    spill_free = features == "causal" and value_columns == 64
    return describe_variant(label, kernel, types, constants, options, spill_free)


def differential_backward_variant(
    head_dim: int,
    value_dim: int,
    shared_k: bool,
    *,
    features: str = "causal",
    dtype: str = "bf16",
    group: int = 4,
) -> KernelVariant:
    """As differential_forward_variant, of differential_bwd_hopper_kernel, without dropout."""
    columns, value_columns = padded_columns(head_dim), padded_columns(value_dim)
    tile = differential_backward_tile(columns, value_columns, shared_k)
    queries = _descriptor(dtype, tile.block_m, columns)
    keys = _descriptor(dtype, BLOCK_N_BACKWARD // 2, columns)
    dq = _descriptor("fp32", tile.block_m, 64)
    kernel = differential_bwd_hopper_kernel
    num_k = 1 if shared_k else 2
    constants = {
        "TILE": backward_shape(
            tile,
            columns,
            group,
            HEADS_KV,
            head_dim,
            value_dim=value_dim,
            value_columns=value_columns,
            num_k=num_k,
        ),
        "FLAGS": _flags(features)._replace(has_softcap=False, has_dropout=False),
    }
    types = _types(
        kernel,
        features,
        dtype,
        ("dk2",) if shared_k else (),
        **dict.fromkeys(("q1_desc", "q2_desc"), queries),
        do_desc=_descriptor(dtype, tile.block_m, value_columns),
        k1_desc=keys,
        k2_desc=None if shared_k else keys,
        v_desc=_descriptor(dtype, BLOCK_N_BACKWARD // 2, value_columns),
        **dict.fromkeys(("dq1_desc", "dq2_desc"), dq),
    )
    options = OPTIONS | {"maxnreg": REGISTERS}
    dims = f"D{head_dim}v{value_dim}-{'one_k' if shared_k else 'two_k'}"
    size = f"{tile.block_m}x{BLOCK_N_BACKWARD}"
    label = f"hopper_diff_bwd-{dims}-g{group}-{features}-{dtype}-{size}"
    return describe_variant(label, kernel, types, constants, options, False)


def kernel_variants(
    head_dims: tuple[int, ...] = (64, 96, 128, 256),
    features: tuple[str, ...] = FEATURES,
    groups: tuple[int, ...] = (1, 2, 4),
) -> Iterator[KernelVariant]:
    """Yields every tile of config.py in bf16, and each plain causal kernel once in fp16.

    Args:
        head_dims: Head dims to compile; the backward of those that support.py has served.
        features: Subset of FEATURES. Without "full", differential attention is that of its two
            published versions.
        groups: Query heads per key/value head. The forward packs them; to the backward they are
            the length of a loop, so it takes the last.
    """
    for head_dim in head_dims:
        x = torch.empty((1, 1, head_dim), dtype=torch.bfloat16, device="meta")
        columns = padded_columns(head_dim)
        # The forward does not know the head dim, only the columns that hold it.
        if head_dim == columns or columns not in head_dims:
            forwards = [name for name in features if name != "deterministic"]
            for group, name in itertools.product(groups, forwards):
                yield forward_variant(head_dim, features=name, group=group)
        for name in features:
            call = Call(x, x, x, deterministic=name == "deterministic")
            if refusal(call, BACKWARD_LIMITS) is None:
                yield backward_variant(head_dim, features=name, group=groups[-1])
        if refusal(Call(x, x, x), DUAL_CHUNK_BACKWARD_LIMITS) is None:
            yield from _dual_chunk_variants(head_dim, features, groups, head_dim == columns)
    if "causal" in features:
        for describe in (forward_variant, backward_variant):
            yield describe(head_dims[0], dtype="fp16", group=groups[-1])
    yield from _differential_variants(head_dims, features, groups[-1])


def _differential_variants(
    head_dims: tuple[int, ...], features: tuple[str, ...], group: int
) -> Iterator[KernelVariant]:
    """Those of differential attention."""
    for dims in DIFFERENTIAL_COLUMNS if "full" in features else DIFFERENTIAL_PUBLISHED:
        head_dim, value_dim, shared_k = dims
        if not {head_dim, value_dim} <= set(head_dims):
            continue
        k = torch.empty((1, 1, head_dim), dtype=torch.bfloat16, device="meta")
        v = torch.empty((1, 1, value_dim), dtype=torch.bfloat16, device="meta")
        call = DifferentialCall(k, k, k, None if shared_k else k, v)
        for name in features:
            if name != "deterministic":
                yield differential_forward_variant(*dims, features=name, group=group)
            if name in ("causal", "full", "all") and (
                refusal(call, DIFFERENTIAL_BACKWARD_LIMITS) is None
            ):
                yield differential_backward_variant(*dims, features=name, group=group)


def _dual_chunk_variants(
    head_dim: int, features: tuple[str, ...], groups: tuple[int, ...], fills_columns: bool
) -> Iterator[KernelVariant]:
    """Those of dual chunk attention with one head dim."""
    if fills_columns:
        for group, name in itertools.product(groups, DUAL_CHUNK_FEATURES):
            if name in features:
                yield dual_chunk_forward_variant(head_dim, features=name, group=group)
    for relation, name in itertools.product(DUAL_CHUNK_RELATIONS, DUAL_CHUNK_FEATURES):
        if name in features and name != "dropout":
            group = groups[-1]
            yield dual_chunk_backward_variant(
                head_dim, features=name, group=group, relation=relation
            )


def _descriptor(dtype: str, rows: int, columns: int) -> str:
    """Triton's name of the type of ragged_descriptor's result."""
    rows_of_heads = torch.empty((1, 1, columns), dtype=_DTYPES[dtype])
    return mangle_type(ragged_descriptor(rows_of_heads, rows, columns))


def _has_dropout(features: str) -> bool:
    return features in ("dropout", "all")


def _flags(features: str, has_sink: bool = False) -> Flags:
    """The flags of a kernel of varlen or differential attention."""
    everything = features == "all"
    return Flags(
        has_left=everything,
        has_right=features != "full",
        has_softcap=everything,
        has_sink=has_sink and everything,
        has_dropout=_has_dropout(features),
    )


def _types(
    kernel: triton.JITFunction,
    features: str,
    dtype: str,
    absent: tuple[str, ...] = (),
    /,
    **descriptors: str | None,
) -> dict[str, object]:
    """Triton's names of the types of a kernel's arguments.

    Args:
        kernel: The kernel.
        features: One of FEATURES.
        dtype: Dtype of the tensors.
        absent: Further pointers that are None.
        descriptors: Types of the descriptors.
    """
    types: dict[str, object] = {
        name: "fp32" if name in _FLOATS else "i32" for name in kernel.arg_names
    }
    if features != "all":
        absent = (*absent, "window", "learnable_sink", "logit_scale")
    if not _has_dropout(features):
        absent = (*absent, "dropout_seed", "document_ids")
    pointers = kernel.fn.__annotations__["pointers"]
    types["pointers"] = pointers._make(
        None if name in absent else _POINTERS.get(name, f"*{dtype}") for name in pointers._fields
    )
    if "strides" in kernel.fn.__annotations__:
        strides = kernel.fn.__annotations__["strides"]
        types["strides"] = strides._make("i32" for _ in strides._fields)
    return types | descriptors
