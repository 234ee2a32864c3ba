"""Lists the Hopper kernels of varlen attention that CI compiles ahead of time, without a GPU."""

import itertools
from collections.abc import Iterator

import torch

from lctrain_kernels.gluon.config import (
    BLOCK_N_BACKWARD,
    REGISTERS,
    SLAB_ROWS,
    backward_shape,
    backward_tile,
    entry_registers,
    forward_shape,
    forward_tile,
    is_persistent,
    pack_heads,
)
from lctrain_kernels.gluon.launch import padded_columns
from lctrain_kernels.gluon.support import BACKWARD_LIMITS, Call, refusal
from lctrain_kernels.gluon.variant import (
    HEADS_KV,
    OPTIONS,
    argument_types,
    attention_flags,
    descriptor_type,
    has_dropout,
)
from lctrain_kernels.tile.fused_variant import fused_variant
from lctrain_kernels.tile.variant import KernelVariant, describe_variant
from lctrain_kernels.varlen.hopper import (
    PREPARE_ROWS,
    varlen_prepare_kernel,
    varlen_round_dq_kernel,
)
from lctrain_kernels.varlen.hopper_bwd import varlen_bwd_hopper_kernel
from lctrain_kernels.varlen.hopper_bwd_persistent import varlen_bwd_persistent_hopper_kernel
from lctrain_kernels.varlen.hopper_bwd_wide import varlen_bwd_wide_hopper_kernel
from lctrain_kernels.varlen.hopper_fwd import varlen_fwd_hopper_kernel


def forward_variant(
    head_dim: int, *, features: str = "causal", dtype: str = "bf16", group: int = 4
) -> KernelVariant:
    """Describes one compilation of varlen_fwd_hopper_kernel.

    Args:
        head_dim: Head dim D of queries and keys.
        features: One of FEATURES. "all" has windows from device memory, softcap, sinks and
            dropout; "deterministic" matters in the backward only.
        dtype: Triton's name of the tensors' dtype, such as "bf16".
        group: Number of query heads per key/value head.
    """
    columns, pack = padded_columns(head_dim), pack_heads(group)
    tile = forward_tile(columns, pack, has_dropout(features))
    rows = descriptor_type(dtype, min(64, tile.consumers * 64 // pack), 64)
    keys = descriptor_type(dtype, tile.block_n, columns)
    constants = {
        "TILE": forward_shape(tile, columns, group, HEADS_KV * group, pack),
        "FLAGS": attention_flags(features, has_sink=True),
    }
    types = argument_types(
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
    head_dim: int,
    *,
    features: str = "causal",
    dtype: str = "bf16",
    group: int = 4,
    short_documents: bool = False,
    long_documents: bool = False,
) -> KernelVariant:
    """Describes one compilation of the backward kernel that serves the head dim and the features.

    The kernel itself has no sinks: their gradient follows from lse and delta.

    Args:
        head_dim: Head dim D.
        features: As in forward_variant.
        dtype: As in forward_variant.
        group: As in forward_variant.
        short_documents: Whether a slab of the float32 dq is one query; see config.slab_rows.
        long_documents: Whether a token's document has at least config.LONG tokens on average.
    """
    columns = padded_columns(head_dim)
    deterministic = features == "deterministic"
    flags = attention_flags(features)
    plain = not (flags.has_dropout or flags.has_softcap)
    tile = backward_tile(head_dim, deterministic, plain, long_documents)
    kernel = varlen_bwd_hopper_kernel if columns <= 128 else varlen_bwd_wide_hopper_kernel
    persistent = is_persistent(tile)
    if persistent:
        kernel = varlen_bwd_persistent_hopper_kernel
    queries = descriptor_type(dtype, tile.block_m, columns)
    keys = descriptor_type(dtype, BLOCK_N_BACKWARD // 2, columns)
    dq = descriptor_type("fp32", tile.block_m, columns // 2)
    shape = backward_shape(
        *(tile, columns, group, HEADS_KV, head_dim, deterministic),
        slab_rows=1 if short_documents else SLAB_ROWS,
    )
    constants = {"TILE": shape, "FLAGS": flags}
    from_registers = tile.reduce_from_registers
    types = argument_types(
        kernel,
        features,
        dtype,
        ("dq",) if persistent else ("semaphores", "dq") if from_registers else (),
        q_desc=queries,
        do_desc=queries,
        k_desc=keys,
        v_desc=keys,
        dq_desc=None if from_registers else dq,
    )
    options = OPTIONS | {"maxnreg": REGISTERS}
    size = f"{tile.block_m}x{shape.block_n}"
    label = f"hopper_bwd-D{head_dim}-g{group}-{features}-{dtype}-{size}"
    label += "-short" if short_documents else "-long" if long_documents else ""
    return describe_variant(label, kernel, types, constants, options, False)


def prepare_variant(head_dim: int, heads: int, dtype: str = "bf16") -> KernelVariant:
    """Describes one compilation of varlen_prepare_kernel, which runs before the backward kernel.

    The variant has the inputs of dropout.

    Args:
        head_dim: Head dim D of queries and keys.
        heads: Number of query heads.
        dtype: Triton's name of the tensors' dtype, such as "bf16".
    """
    kernel = varlen_prepare_kernel
    others: dict[str, str | None] = {"keep_scale": "fp32"}
    others |= dict.fromkeys(
        ("lse_ptr", "dlse_ptr", "delta_ptr", "lse2_ptr", "kept_delta_ptr"), "*fp32"
    )
    columns = padded_columns(head_dim)
    if backward_tile(head_dim, False, plain=False).reduce_from_registers:
        others["dq_ptr"] = None
    constants = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": columns,
        "ROWS": PREPARE_ROWS,
    }
    return fused_variant(f"varlen_prepare-D{head_dim}", kernel, dtype, others, constants, 8)


def round_dq_variant(head_dim: int, heads: int, dtype: str = "bf16") -> KernelVariant:
    """Describes one compilation of varlen_round_dq_kernel, which runs after the backward kernel.

    The arguments are those of prepare_variant.
    """
    others: dict[str, str | None] = {"sum_ptr": "*fp32", "cu_q_ptr": "*i32", "scale": "fp32"}
    constants = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_columns(head_dim),
        "SLABS": PREPARE_ROWS // 16,
    }
    label = f"varlen_round_dq-D{head_dim}"
    return fused_variant(label, varlen_round_dq_kernel, dtype, others, constants, 8)


def kernel_variants(
    head_dims: tuple[int, ...], features: tuple[str, ...], groups: tuple[int, ...]
) -> Iterator[KernelVariant]:
    """Yields the variants of the Hopper kernels to compile.

    Every tile configuration is compiled in bf16; the plain causal kernels also in fp16.

    Args:
        head_dims: Head dims to compile. A backward that the Hopper kernels do not support is
            skipped.
        features: Subset of FEATURES.
        groups: Numbers of query heads per key/value head. The forward is compiled for each, the
            backward, which loops over the heads, for the last one only.
    """
    for head_dim in head_dims:
        x = torch.empty((1, 1, head_dim), dtype=torch.bfloat16, device="meta")
        columns = padded_columns(head_dim)
        # The forward depends only on the padded head dim.
        if head_dim == columns or columns not in head_dims:
            forwards = [name for name in features if name != "deterministic"]
            for group, name in itertools.product(groups, forwards):
                yield forward_variant(head_dim, features=name, group=group)
        for name in features:
            call = Call(x, x, x, deterministic=name == "deterministic")
            if refusal(call, BACKWARD_LIMITS) is None:
                yield backward_variant(head_dim, features=name, group=groups[-1])
        if "causal" in features and refusal(Call(x, x, x), BACKWARD_LIMITS) is None:
            yield prepare_variant(head_dim, HEADS_KV * groups[-1])
            if backward_tile(head_dim, False, True).reduce_from_registers:
                yield round_dq_variant(head_dim, HEADS_KV * groups[-1])
                yield backward_variant(head_dim, group=groups[-1], short_documents=True)
            elif backward_tile(head_dim, False, True, True).reduce_from_registers:
                yield round_dq_variant(head_dim, HEADS_KV * groups[-1])
                yield backward_variant(head_dim, group=groups[-1], long_documents=True)
    if "causal" in features:
        for describe in (forward_variant, backward_variant):
            yield describe(head_dims[0], dtype="fp16", group=groups[-1])
