"""Lists the Hopper kernels of differential attention that CI compiles ahead of time."""

from collections.abc import Iterator

import torch

from lctrain_kernels.differential.aot import VERSIONS
from lctrain_kernels.differential.hopper import (
    PREPARE_ROWS,
    differential_prepare_kernel,
    differential_round_dq_kernel,
)
from lctrain_kernels.differential.hopper_bwd import differential_bwd_hopper_kernel
from lctrain_kernels.differential.hopper_fwd import differential_fwd_hopper_kernel
from lctrain_kernels.differential.hopper_support import (
    BACKWARD_LIMITS,
    COLUMNS,
    DifferentialCall,
    backward_tile,
    forward_tile,
)
from lctrain_kernels.gluon.config import (
    BLOCK_N_BACKWARD,
    CONSUMERS,
    REGISTERS,
    backward_shape,
    forward_shape,
    pack_heads,
)
from lctrain_kernels.gluon.launch import padded_columns
from lctrain_kernels.gluon.support import refusal
from lctrain_kernels.gluon.variant import (
    HEADS_KV,
    OPTIONS,
    argument_types,
    attention_flags,
    descriptor_type,
)
from lctrain_kernels.tile.fused_variant import fused_variant
from lctrain_kernels.tile.variant import KernelVariant, describe_variant


def forward_variant(
    head_dim: int,
    value_dim: int,
    shared_k: bool,
    *,
    features: str = "causal",
    dtype: str = "bf16",
    group: int = 4,
) -> KernelVariant:
    """Describes one compilation of differential_fwd_hopper_kernel, without softcap and sinks.

    Args:
        head_dim: Head dim D of queries and keys.
        value_dim: Head dim Dv of the values.
        shared_k: Whether both branches read one k.
        features: Features of the call that the kernel compiles, one of gluon/variant.py's FEATURES.
        dtype: Triton's name of the tensors' dtype, such as "bf16".
        group: Number of query heads per key/value head.
    """
    columns, value_columns = padded_columns(head_dim), padded_columns(value_dim)
    pack = pack_heads(group)
    tile = forward_tile(columns, value_columns, shared_k)
    rows = descriptor_type(dtype, min(64, CONSUMERS * 64 // pack), 64)
    keys = descriptor_type(dtype, tile.block_n, columns)
    values = descriptor_type(dtype, tile.block_n, value_columns)
    kernel = differential_fwd_hopper_kernel
    num_k = 1 if shared_k else 2
    constants = {
        "TILE": forward_shape(tile, columns, group, HEADS_KV * group, pack, value_columns, num_k),
        "FLAGS": attention_flags(features)._replace(has_softcap=False),
    }
    types = argument_types(
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
    # Values of 128 columns leave no registers for all arguments; D = 64 does not spill in the loop.
    spill_free = features == "causal" and value_columns == 64
    return describe_variant(label, kernel, types, constants, options, spill_free)


def backward_variant(
    head_dim: int,
    value_dim: int,
    shared_k: bool,
    *,
    features: str = "causal",
    dtype: str = "bf16",
    group: int = 4,
    short_documents: bool = False,
) -> KernelVariant:
    """Describes one compilation of differential_bwd_hopper_kernel, without dropout.

    `short_documents` says whether documents have less than 16 queries on average. The other
    arguments are those of forward_variant.
    """
    columns, value_columns = padded_columns(head_dim), padded_columns(value_dim)
    tokens = 1 if short_documents else 1 << 15
    tile = backward_tile(columns, value_columns, shared_k, tokens)
    queries = descriptor_type(dtype, tile.block_m, columns)
    keys = descriptor_type(dtype, BLOCK_N_BACKWARD // 2, columns)
    dq = descriptor_type("fp32", tile.block_m, 64)
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
        "FLAGS": attention_flags(features)._replace(has_softcap=False, has_dropout=False),
    }
    types = argument_types(
        kernel,
        features,
        dtype,
        (
            *(("dk2",) if shared_k else ()),
            *(() if tile.reduce_from_registers else ("dq_sum",)),
        ),
        **dict.fromkeys(("q1_desc", "q2_desc"), queries),
        do_desc=descriptor_type(dtype, tile.block_m, value_columns),
        k1_desc=keys,
        k2_desc=None if shared_k else keys,
        v_desc=descriptor_type(dtype, BLOCK_N_BACKWARD // 2, value_columns),
        **dict.fromkeys(("dq1_desc", "dq2_desc"), None if tile.reduce_from_registers else dq),
    )
    options = OPTIONS | {"maxnreg": REGISTERS}
    dims = f"D{head_dim}v{value_dim}-{'one_k' if shared_k else 'two_k'}"
    size = f"{tile.block_m}x{BLOCK_N_BACKWARD}"
    label = f"hopper_diff_bwd-{dims}-g{group}-{features}-{dtype}-{size}"
    label += "-registers" if tile.reduce_from_registers else ""
    return describe_variant(label, kernel, types, constants, options, False)


def prepare_variant(
    head_dim: int, value_dim: int, heads: int, dtype: str = "bf16", zeroes: bool = True
) -> KernelVariant:
    """Describes one compilation of differential_prepare_kernel, which prepares the backward.

    The variant has gradients of both lse.

    Args:
        head_dim: Head dim D of queries and keys.
        value_dim: Head dim Dv of the values.
        heads: Number of query heads.
        dtype: Triton's name of the tensors' dtype, such as "bf16".
        zeroes: Whether the kernel zeroes the sums of dq, to which the dQ warp adds.
    """
    kernel = differential_prepare_kernel
    others: dict[str, str | None] = dict.fromkeys(
        (
            *("lam", "lse1", "lse2", "dlse1", "dlse2"),
            *("dq1", "dq2", "dlam", "stats"),
        ),
        "*fp32",
    )
    if not zeroes:
        others |= {"dq1": None, "dq2": None}
    constants = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_columns(head_dim),
        "VALUE_DIM": value_dim,
        "BLOCK_DV": padded_columns(value_dim),
        "ROWS": PREPARE_ROWS,
    }
    label = f"diff_prepare-D{head_dim}v{value_dim}{'' if zeroes else '-registers'}"
    return fused_variant(label, kernel, dtype, others, constants, 8)


def round_dq_variant(head_dim: int, heads: int, dtype: str = "bf16") -> KernelVariant:
    """Describes one compilation of differential_round_dq_kernel, which ends the backward.

    The arguments are those of prepare_variant.
    """
    others: dict[str, str | None] = {"sum1_ptr": "*fp32", "sum2_ptr": "*fp32", "scale": "fp32"}
    constants = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_columns(head_dim),
        "ROWS": PREPARE_ROWS,
    }
    label = f"diff_round_dq-D{head_dim}"
    return fused_variant(label, differential_round_dq_kernel, dtype, others, constants, 8)


def kernel_variants(
    head_dims: tuple[int, ...], features: tuple[str, ...], groups: tuple[int, ...]
) -> Iterator[KernelVariant]:
    """Yields the variants of the Hopper kernels to compile: every tile configuration, in bf16.

    Only the last number of `groups` is compiled. Without "full" among the features, only the two
    published versions of differential attention are compiled. The arguments are those of
    varlen.aot_hopper.kernel_variants.
    """
    for dims in COLUMNS if "full" in features else VERSIONS:
        head_dim, value_dim, shared_k = dims
        if not {head_dim, value_dim} <= set(head_dims):
            continue
        k = torch.empty((1, 1, head_dim), dtype=torch.bfloat16, device="meta")
        v = torch.empty((1, 1, value_dim), dtype=torch.bfloat16, device="meta")
        call = DifferentialCall(k, k, k, None if shared_k else k, v)
        for name in features:
            if name != "deterministic":
                yield forward_variant(*dims, features=name, group=groups[-1])
            if name in ("causal", "full", "all") and (refusal(call, BACKWARD_LIMITS) is None):
                yield backward_variant(*dims, features=name, group=groups[-1])
                if backward_tile(*dims).reduce_from_registers:
                    yield backward_variant(
                        *dims, features=name, group=groups[-1], short_documents=True
                    )
        if "causal" in features:
            yield prepare_variant(head_dim, value_dim, HEADS_KV * groups[-1])
            if (
                refusal(call, BACKWARD_LIMITS) is None
                and backward_tile(*dims).reduce_from_registers
            ):
                yield prepare_variant(head_dim, value_dim, HEADS_KV * groups[-1], zeroes=False)
            yield round_dq_variant(head_dim, HEADS_KV * groups[-1])
