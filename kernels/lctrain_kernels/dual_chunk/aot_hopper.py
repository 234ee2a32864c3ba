"""Lists the Hopper kernels of dual chunk attention that CI compiles ahead of time."""

import itertools
from collections.abc import Iterator

import torch

from lctrain_kernels.dual_chunk.hopper import (
    dual_chunk_rotate_dk_kernel,
    dual_chunk_round_dq_kernel,
)
from lctrain_kernels.dual_chunk.hopper_bwd import dual_chunk_bwd_hopper_kernel
from lctrain_kernels.dual_chunk.hopper_dq import dual_chunk_dq_slabs_kernel
from lctrain_kernels.dual_chunk.hopper_fwd import dual_chunk_fwd_hopper_kernel
from lctrain_kernels.dual_chunk.hopper_support import (
    BACKWARD_LIMITS,
    BackwardForm,
    backward_form,
    forward_tile,
)
from lctrain_kernels.dual_chunk.ranges import INTER, INTRA, SUCC
from lctrain_kernels.dual_chunk.triton_rotate import ROTATE_CONFIG
from lctrain_kernels.gluon.config import (
    BLOCK_N_BACKWARD,
    CONSUMERS,
    REGISTERS,
    backward_shape,
    forward_shape,
    pack_heads,
)
from lctrain_kernels.gluon.launch import padded_columns
from lctrain_kernels.gluon.support import Call, refusal
from lctrain_kernels.gluon.variant import (
    HEADS_KV,
    OPTIONS,
    argument_types,
    descriptor_type,
    has_dropout,
)
from lctrain_kernels.tile.arguments import padded_head_dim
from lctrain_kernels.tile.fused_variant import fused_variant
from lctrain_kernels.tile.structures import Flags
from lctrain_kernels.tile.variant import KernelVariant, describe_variant

FEATURES = ("causal", "dropout", "offset_dropout", "all")
"""What a variant computes; "all" has dropout and a logit_scale."""
RELATIONS = {SUCC.value: "succ", INTRA.value: "intra", INTER.value: "inter"}
"""Launches of the backward, one per range of keys; see ranges.py."""
_SCRATCH_TYPES: dict[str, str | None] = {
    **dict.fromkeys(("sum_ptr", "inv_freq_ptr", "logit_scale_ptr"), "*fp32"),
    **dict.fromkeys(("cu_q_ptr", "cu_k_ptr", "tiles_ptr"), "*i32"),
    "scale": "fp32",
}


def forward_variant(
    head_dim: int, *, features: str = "causal", dtype: str = "bf16", group: int = 4
) -> KernelVariant:
    """Describes one compilation of dual_chunk_fwd_hopper_kernel.

    Args:
        head_dim: Head dim D of queries and keys.
        features: Features of the call that the kernel compiles, one of FEATURES.
        dtype: Triton's name of the tensors' dtype, such as "bf16".
        group: Number of query heads per key/value head.
    """
    columns, pack = padded_columns(head_dim), pack_heads(group)
    tile = forward_tile(columns)
    rows = descriptor_type(dtype, min(64, CONSUMERS * 64 // pack), 64)
    keys = descriptor_type(dtype, tile.block_n, columns)
    kernel = dual_chunk_fwd_hopper_kernel
    constants = {
        "TILE": forward_shape(tile, columns, group, HEADS_KV * group, pack),
        "FLAGS": Flags(has_dropout=has_dropout(features)),
    }
    types = argument_types(
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


def backward_variant(
    head_dim: int,
    *,
    features: str = "causal",
    dtype: str = "bf16",
    group: int = 4,
    relation: int = INTRA.value,
    form: BackwardForm | None = None,
) -> KernelVariant:
    """Describes one compilation of dual_chunk_bwd_hopper_kernel, without dropout.

    `relation` is the range of keys of the launch: INTER, SUCC or INTRA. `form` is the form of the
    steps, by default that of long documents. The other arguments are those of forward_variant.
    """
    columns = padded_columns(head_dim)
    tile, full_weights = form or backward_form(head_dim, 1 << 15, 1)
    queries = descriptor_type(dtype, tile.block_m, columns)
    keys = descriptor_type(dtype, BLOCK_N_BACKWARD // 2, columns)
    dq = descriptor_type("fp32", tile.block_m, columns // 2)
    kernel = dual_chunk_bwd_hopper_kernel
    constants = {
        "TILE": backward_shape(tile, columns, group, HEADS_KV, head_dim),
        "RELATION": relation,
        "FULL_WEIGHTS": full_weights,
    }
    types = argument_types(
        kernel,
        features,
        dtype,
        (
            *(("dk", "dv") if relation == SUCC.value else ()),
            *(() if tile.reduce_from_registers else ("dq_sum",)),
        ),
        q_desc=queries,
        do_desc=queries,
        k_desc=keys,
        v_desc=keys,
        dq_desc=None if tile.reduce_from_registers else dq,
    )
    options = OPTIONS | {"maxnreg": REGISTERS}
    size = f"{tile.block_m}x{BLOCK_N_BACKWARD}"
    name = f"hopper_dual_chunk_bwd_{RELATIONS[relation]}"
    label = f"{name}-D{head_dim}-g{group}-{features}-{dtype}-{size}"
    label += "-later" if tile.reduce_from_registers else "-full" if full_weights else ""
    return describe_variant(label, kernel, types, constants, options, False)


def rotate_dk_variant(head_dim: int) -> KernelVariant:
    """Describes one compilation of dual_chunk_rotate_dk_kernel, for keys of head dim `head_dim`."""
    kernel = dual_chunk_rotate_dk_kernel
    constants = {"HEADS": HEADS_KV, **_rows(head_dim)}
    label = f"hopper_dual_chunk_rotate_dk-D{head_dim}"
    return fused_variant(label, kernel, "fp32", _SCRATCH_TYPES, constants, 4)


def round_dq_variant(head_dim: int, heads: int, dtype: str = "bf16") -> KernelVariant:
    """Describes one compilation of dual_chunk_round_dq_kernel, with a logit scale.

    Args:
        head_dim: Head dim D of queries and keys.
        heads: Number of query heads.
        dtype: Triton's name of dq's dtype.
    """
    kernel = dual_chunk_round_dq_kernel
    constants = {"HEADS": heads, **_rows(head_dim)}
    label = f"hopper_dual_chunk_round_dq-D{head_dim}"
    return fused_variant(label, kernel, dtype, _SCRATCH_TYPES, constants, 4)


def dq_slabs_variant(head_dim: int, heads: int, rounds: bool, dtype: str = "bf16") -> KernelVariant:
    """Describes one compilation of dual_chunk_dq_slabs_kernel.

    Args:
        head_dim: Head dim D of queries and keys, a multiple of 16.
        heads: Number of query heads.
        rounds: Whether the kernel writes dq, with a logit scale. Otherwise it rotates the sum.
        dtype: Triton's name of dq's dtype.
    """
    kernel = dual_chunk_dq_slabs_kernel
    types = _SCRATCH_TYPES if rounds else _SCRATCH_TYPES | {"dq_ptr": None, "logit_scale_ptr": None}
    constants = {"HEADS": heads, **_rows(head_dim)}
    label = f"hopper_dual_chunk_dq_slabs-D{head_dim}-{'round' if rounds else 'rotate'}"
    return fused_variant(label, kernel, dtype, types, constants, 4)


def _rows(head_dim: int) -> dict[str, int]:
    """Returns the tile constants of dual_chunk_the kernels beside the backward."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_M": ROTATE_CONFIG.block_m,
    }


def kernel_variants(
    head_dims: tuple[int, ...], features: tuple[str, ...], groups: tuple[int, ...]
) -> Iterator[KernelVariant]:
    """Yields the variants of the Hopper kernels to compile: every tile configuration, in bf16.

    The arguments are those of varlen.aot_hopper.kernel_variants.
    """
    wanted = [name for name in FEATURES if name in features]
    for head_dim in head_dims:
        x = torch.empty((1, 1, head_dim), dtype=torch.bfloat16, device="meta")
        if refusal(Call(x, x, x), BACKWARD_LIMITS) is not None:
            continue
        if head_dim == padded_columns(head_dim):
            for group, name in itertools.product(groups, wanted):
                yield forward_variant(head_dim, features=name, group=group)
        packs = ((1 << 15, 1), (1, 1))  # tokens and documents: long ones, short ones
        forms = dict.fromkeys(backward_form(head_dim, *pack) for pack in packs)
        for relation, name, form in itertools.product(RELATIONS, wanted, forms):
            if "dropout" not in name:
                yield backward_variant(
                    head_dim, features=name, group=groups[-1], relation=relation, form=form
                )
        if "causal" in features:
            yield rotate_dk_variant(head_dim)
            yield round_dq_variant(head_dim, HEADS_KV * groups[-1])
            if any(form.tile.reduce_from_registers for form in forms):
                for rounds in (False, True):
                    yield dq_slabs_variant(head_dim, HEADS_KV * groups[-1], rounds)
