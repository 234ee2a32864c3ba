"""The public functions of the package `lctrain_kernels`, under the name `lctrain.kernels`.

    from lctrain.kernels import flash_attn_varlen_func

Importing this module does not import `lctrain_kernels`; the first use of a function does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lctrain_kernels import (
        DecodePlan,
        SharedPrefixes,
        TileSchedule,
        VocabularyShard,
        apply_rotary_emb,
        batch_invariant_linear,
        bias_gelu,
        diff_attn_varlen_func,
        diff_attn_with_kvcache,
        dual_chunk_attn_varlen_func,
        dual_chunk_attn_with_kvcache,
        flash_attn_func,
        flash_attn_varlen_func,
        flash_attn_with_kvcache,
        fused_add_layer_norm,
        fused_add_rms_norm,
        gated_linear,
        geglu,
        layer_norm,
        linear_add,
        linear_cross_entropy,
        make_decode_plan,
        make_schedule,
        make_shared_prefixes,
        merge_attn_states,
        merged_linear,
        pad_input,
        qk_norm_rotary,
        rms_norm,
        rms_norm_residual,
        rotary_table,
        rotate_qk,
        select_backend,
        swiglu,
        unpad_input,
    )

__all__ = [
    "DecodePlan",
    "SharedPrefixes",
    "TileSchedule",
    "VocabularyShard",
    "apply_rotary_emb",
    "batch_invariant_linear",
    "bias_gelu",
    "diff_attn_varlen_func",
    "diff_attn_with_kvcache",
    "dual_chunk_attn_varlen_func",
    "dual_chunk_attn_with_kvcache",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "fused_add_layer_norm",
    "fused_add_rms_norm",
    "gated_linear",
    "geglu",
    "layer_norm",
    "linear_add",
    "linear_cross_entropy",
    "make_decode_plan",
    "make_schedule",
    "make_shared_prefixes",
    "merge_attn_states",
    "merged_linear",
    "pad_input",
    "qk_norm_rotary",
    "rms_norm",
    "rms_norm_residual",
    "rotary_table",
    "rotate_qk",
    "select_backend",
    "swiglu",
    "unpad_input",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lctrain.kernels' has no attribute {name!r}")
    import lctrain_kernels

    return getattr(lctrain_kernels, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
