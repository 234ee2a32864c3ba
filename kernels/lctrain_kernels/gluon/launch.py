"""Makes launch arguments of the Hopper kernels: TMA descriptors and the size of the grid."""

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lctrain_kernels.gluon.coordinates import RAGGED
from lctrain_kernels.launch import KEYED_TYPES
from lctrain_kernels.tile.arguments import padded_head_dim

_OUTER = 0x7FFF0000
_STRIDE = 1 << 34
_DTYPES = {
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
    torch.float32: gl.float32,
}


def ragged_descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Returns a TMA descriptor of packed rows with which copies stop at a document's end.

    A tile is read or written at [2^30, begin + length, 2^30 - length + row, head, column]. The row
    dimension has size 2^30, so it ends where the document ends: TMA reads rows beyond as zero, and
    does not write them. The first two coordinates undo the shift of the row coordinate in the
    address, which is computed modulo 2^64, as in triton.tools.ragged_tma.

    The function checks nothing, because TensorDescriptor's checks take longer than all else in a
    launch: `lctrain_kernels.gluon.support` states which tensors TMA can read.

    Args:
        tensor: Tensor [T, H, D], strides multiples of 16 bytes, last stride 1.
        rows: Rows of a tile.
        columns: Columns of a tile.
    """
    stride_t, stride_h, _ = tensor.stride()
    _, heads, head_dim = tensor.shape
    descriptor = object.__new__(TensorDescriptor)  # without __post_init__, which checks
    descriptor.base = tensor
    descriptor.shape = [_OUTER, _OUTER, RAGGED.value, heads, head_dim]
    descriptor.strides = [_STRIDE - stride_t, stride_t, stride_t, stride_h, 1]
    descriptor.block_shape = [1, 1, rows, 1, columns]
    descriptor.layout = _layout(rows, columns, tensor.dtype)
    descriptor.launch_key = ("ragged", rows, columns, tensor.dtype)
    return descriptor


KEYED_TYPES.add(TensorDescriptor)


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Returns the layout of a tile in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, 1, columns], _DTYPES[dtype])


def padded_columns(head_dim: int) -> int:
    """Returns the columns of a Hopper kernel's tile: a power of two >= head_dim, at least 64."""
    return max(64, padded_head_dim(head_dim))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
