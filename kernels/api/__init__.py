"""lctrain.kernels: attention and its companions on packed documents, usable on their own."""

from lctrain.kernels.backend import select_backend
from lctrain.kernels.differential import diff_attn_varlen_func
from lctrain.kernels.dual_chunk import dual_chunk_attn_varlen_func
from lctrain.kernels.linear_cross_entropy import linear_cross_entropy
from lctrain.kernels.merge import merge_attn_states
from lctrain.kernels.padding import pad_input, unpad_input
from lctrain.kernels.schedule import TileSchedule, make_schedule
from lctrain.kernels.varlen import flash_attn_func, flash_attn_varlen_func

__all__ = [
    "TileSchedule",
    "diff_attn_varlen_func",
    "dual_chunk_attn_varlen_func",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "linear_cross_entropy",
    "make_schedule",
    "merge_attn_states",
    "pad_input",
    "select_backend",
    "unpad_input",
]
