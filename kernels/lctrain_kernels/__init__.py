"""Attention, loss, norm, rotary and activation kernels for training on packed documents.

The package works without lctrain. lctrain users import the functions from `lctrain.kernels`.
"""

from lctrain_kernels.backend import select_backend
from lctrain_kernels.cross_entropy.api import linear_cross_entropy
from lctrain_kernels.cross_entropy.options import VocabularyShard
from lctrain_kernels.decode.api import flash_attn_with_kvcache
from lctrain_kernels.decode.plan import make_decode_plan
from lctrain_kernels.decode.prefixes import make_shared_prefixes
from lctrain_kernels.decode.structures import DecodePlan, SharedPrefixes
from lctrain_kernels.differential.api import diff_attn_varlen_func
from lctrain_kernels.differential.cached import diff_attn_with_kvcache
from lctrain_kernels.dual_chunk.api import dual_chunk_attn_varlen_func
from lctrain_kernels.dual_chunk.cached import dual_chunk_attn_with_kvcache
from lctrain_kernels.linear.api import batch_invariant_linear, linear_add, merged_linear
from lctrain_kernels.merge import merge_attn_states
from lctrain_kernels.mlp.api import bias_gelu, gated_linear, geglu, swiglu
from lctrain_kernels.norm.api import (
    fused_add_layer_norm,
    fused_add_rms_norm,
    layer_norm,
    rms_norm,
    rms_norm_residual,
)
from lctrain_kernels.padding import pad_input, unpad_input
from lctrain_kernels.rotary.api import (
    apply_rotary_emb,
    qk_norm_rotary,
    rotary_table,
    rotate_qk,
)
from lctrain_kernels.schedule import TileSchedule, make_schedule
from lctrain_kernels.varlen.api import flash_attn_func, flash_attn_varlen_func

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
