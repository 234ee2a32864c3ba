"""Launch arguments of the Hopper kernels: TMA descriptors, counters, the size of the grid."""

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lctrain_kernels.gluon.coordinates import RAGGED
from lctrain_kernels.tile.arguments import padded_head_dim

_OUTER = 0x7FFF0000
_STRIDE = 1 << 34
_DTYPES = {
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
    torch.float32: gl.float32,
}


def ragged_descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describes packed rows so that the hardware stops at the end of any document.

    A tile is read or written at [2^30, begin + length, 2^30 - length + row, head, column]. The row
    coordinate passes 2^30, the size of its dimension, just where the document ends: what lies
    beyond is read as zero and not written. The first two coordinates undo that shift in the
    address, which is computed modulo 2^64. (The trick of triton.tools.ragged_tma.)

    Args:
        tensor: [T, H, D], strides multiples of 16 bytes, last stride 1.
        rows: Rows of a tile.
        columns: Columns of a tile.
    """
    stride_t, stride_h, _ = tensor.stride()
    block = [1, 1, rows, 1, columns]
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPES[tensor.dtype])
    return TensorDescriptor(
        tensor,
        [_OUTER, _OUTER, RAGGED.value, tensor.shape[1], tensor.shape[2]],
        [_STRIDE - stride_t, stride_t, stride_t, stride_h, 1],
        block,
        layout,
    )


def padded_columns(head_dim: int) -> int:
    """Columns of a tile: a power of two, at least one 128-byte row."""
    return max(64, padded_head_dim(head_dim))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
