"""Gives one name to each Gluon function whose name differs between Triton's releases.

Gluon is experimental. For example, `tma.async_copy_global_to_shared` of Triton 3.6 is
`tma.async_load` in 3.9. Kernels import such functions from here, and all others from Gluon.
"""

from typing import Any

from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
copy_arrive = async_copy.mbarrier_arrive
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait
partition_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

if hasattr(tma, "async_atomic_add"):
    tma_add = tma.async_atomic_add
else:

    @builtin
    def tma_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
        """Adds a tile of shared memory to global memory by TMA, asynchronously.

        Triton 3.6 lacks this function, so it is built here from the operation of its compiler.

        Args:
            tensor_desc: TMA descriptor of the tensor in global memory.
            coord: Coordinates of the tile's first element, one per dimension.
            src: Tile in shared memory, in the shape of the descriptor's block.
            _semantic: Argument that Triton passes to every built-in function.
        """
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(
            ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle
        )


@builtin
def reinterpret(buffer: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """Returns a buffer of shared memory with another dtype, shape and layout, without a copy.

    Before Triton 3.9 the method that this function calls is private.
    """
    method = getattr(buffer, "reinterpret", None) or buffer._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


__all__ = [
    "copy_arrive",
    "copy_async",
    "partition_barrier",
    "reinterpret",
    "tma_add",
    "tma_load",
    "tma_store",
    "tma_store_wait",
]
