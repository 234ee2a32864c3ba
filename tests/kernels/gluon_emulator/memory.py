"""Emulates shared memory, pointers to global memory, and TMA descriptors."""

import math
from typing import Any

import numpy as np
import torch
from triton import language as tl

from tests.kernels.gluon_emulator.machine import note_write, require_fenced
from tests.kernels.gluon_emulator.values import Value, as_value, storage

_TL_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int64: tl.int64,
    torch.int32: tl.int32,
    torch.uint8: tl.uint8,
    torch.bool: tl.int1,
}


class Buffer:
    """A tensor in shared memory.

    A swizzled tile is stored in panels of 128 bytes per row: `array` is [..., panels, rows, columns
    of a panel]. The hardware's permutation of 16-byte pieces within eight rows is omitted, since
    tiles start at multiples of eight rows. Other layouts are stored row by row.
    """

    def __init__(self, array: np.ndarray, shape: tuple[int, ...], dtype: tl.dtype, panels: bool):
        self.array = array
        self.shape = shape
        self.dtype = dtype
        self.panels = panels
        self.transposed = False

    @classmethod
    def view(cls, flat: np.ndarray, shape: Any, dtype: tl.dtype, layout: Any) -> "Buffer":
        """Returns a buffer of a shape and layout over contiguous memory, without a copy."""
        shape = tuple(int(size) for size in shape)
        width = getattr(layout, "swizzle_byte_width", 0) * 8 // dtype.primitive_bitwidth
        if width == 0:
            return cls(flat.reshape(shape), shape, dtype, False)
        rank = layout.rank
        lead, tile = shape[: len(shape) - rank], shape[len(shape) - rank :]
        rows, columns = math.prod(tile[:-1]), tile[-1]
        width = min(width, columns)
        array = flat.reshape(*lead, columns // width, rows, width)
        return cls(array, shape, dtype, True)

    def index(self, i: Any) -> "Buffer":
        return Buffer(self.array[int(as_value(i))], self.shape[1:], self.dtype, self.panels)

    def slice(self, start: Any, length: int, dim: int = 0) -> "Buffer":
        """Returns a view of `length` columns of a tile, from column `start` on."""
        start = int(as_value(start))
        assert self.panels, "only columns of a tile"
        assert (len(self.shape), dim) == (2, 1), "only columns of a tile"
        assert 0 <= start <= self.shape[1] - length
        width = self.array.shape[-1]
        if length % width == 0 and start % width == 0:
            part = self.array[start // width : (start + length) // width]
        else:
            assert start // width == (start + length - 1) // width, "a slice across panels"
            part = self.array[start // width][None, :, start % width : start % width + length]
        return Buffer(part, (self.shape[0], length), self.dtype, True)

    def permute(self, order: Any) -> "Buffer":
        assert tuple(order) == (1, 0)
        result = Buffer(self.array, self.shape[::-1], self.dtype, self.panels)
        result.transposed = not self.transposed
        return result

    def reinterpret(self, dtype: tl.dtype, shape: Any, layout: Any) -> "Buffer":
        assert self.array.flags.c_contiguous
        assert storage(dtype) == self.array.dtype
        return Buffer.view(self.array.reshape(-1), shape, dtype, layout)

    def read(self) -> np.ndarray:
        """Returns the elements row by row."""
        array = self.array
        if self.panels:
            array = np.moveaxis(array, -3, -2)
            array = array.reshape(*array.shape[:-2], -1)
        if self.transposed:
            return array.T
        return array.reshape(self.shape).copy()

    def write(self, array: np.ndarray) -> None:
        array = array.T if self.transposed else array
        assert array.size == self.array.size, f"{array.shape} into {self.shape}"
        if self.panels:
            panels, rows, width = self.array.shape
            self.array[...] = np.moveaxis(array.reshape(rows, panels, width), 0, 1)
        else:
            self.array[...] = array.reshape(self.array.shape)

    def load(self, layout: Any = None) -> Value:
        """Returns the buffer's elements as a tensor in registers."""
        return Value(self.read(), self.dtype)

    def store(self, value: Any) -> None:
        """Writes a tensor from registers; engines see it only after a fence."""
        value = as_value(value)
        assert value.dtype == self.dtype
        assert value.shape == self.shape
        self.write(value.array)
        note_write(*np.lib.array_utils.byte_bounds(self.array))

    def show(self) -> None:
        """Fails if the buffer has writes without a fence, which an engine may not see."""
        require_fenced(*np.lib.array_utils.byte_bounds(self.array))


class GlobalMemory:
    """The storage of a CPU tensor, read and written by element index."""

    def __init__(self, tensor: torch.Tensor):
        self.dtype = _TL_DTYPES[tensor.dtype]
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        self.is_bfloat16 = tensor.dtype == torch.bfloat16
        # Tensor.numpy marks the memory for ever as shared: no backward would overwrite it.
        self.flat = np.from_dlpack(whole.view(torch.int16) if self.is_bfloat16 else whole)
        self.begin = tensor.storage_offset()
        self.address = whole.data_ptr()

    def load(self, place: np.ndarray) -> np.ndarray:
        self._check(place)
        values = self.flat[place]
        if self.is_bfloat16:
            return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return values

    def store(self, place: np.ndarray, values: np.ndarray) -> None:
        self._check(place)
        if self.is_bfloat16:
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            values = (bits >> 16).astype(np.uint16).view(np.int16)
        self.flat[place] = values

    def _check(self, place: np.ndarray) -> None:
        if place.size and not (place.min() >= 0 and place.max() < self.flat.size):
            raise IndexError(f"address {place.min()} to {place.max()} of {self.flat.size} elements")


class PointerType:
    def __init__(self, element_ty: tl.dtype):
        self.element_ty = element_ty


class Pointer:
    """One address, or a tensor of addresses, counted in elements of a tensor's storage."""

    def __init__(self, memory: GlobalMemory, place: Value):
        self.memory = memory
        self.place = place
        self.dtype = PointerType(memory.dtype)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Pointer":
        memory = GlobalMemory(tensor)
        return cls(memory, Value(memory.begin, tl.int64))

    def to(self, dtype: tl.dtype) -> "Pointer":
        """Returns the pointer as an integer, for assembly."""
        assert dtype == tl.int64
        return self

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.place + as_value(offset))

    def __getitem__(self, index: Any) -> "Pointer":
        return Pointer(self.memory, self.place[index])

    def load(self, mask: Any = None, other: Any = None) -> Value:
        """Returns the elements at these addresses; `other`, or NaN, where the mask is false."""
        place = self.place.array
        if mask is None:
            return Value(self.memory.load(place), self.memory.dtype)
        place, inside = np.broadcast_arrays(place, as_value(mask).array)
        fill = np.nan if self.memory.dtype.is_floating() else 0
        fill = fill if other is None else as_value(other).array
        result = np.array(np.broadcast_to(fill, place.shape), dtype=storage(self.memory.dtype))
        result[inside] = self.memory.load(place[inside])
        return Value(result, self.memory.dtype)

    def store(self, value: Any, mask: Any = None) -> None:
        values = as_value(value).to(self.memory.dtype).array
        inside = True if mask is None else as_value(mask).array
        place, values, inside = np.broadcast_arrays(self.place.array, values, inside)
        self.memory.store(place[inside], values[inside])


class Descriptor:
    """Emulates a TMA descriptor: elements outside its shape read as zero and are not written."""

    def __init__(self, host: Any):
        self.memory = GlobalMemory(host.base)
        self.shape = tuple(host.shape)
        self.strides = tuple(host.strides)
        self.block = tuple(host.block_shape)
        self.dtype = self.memory.dtype
        self.layout = host.layout

    @property
    def bytes(self) -> int:
        """Number of bytes that a barrier counts for a tile, including bytes outside the tensor."""
        return math.prod(self.block) * self.dtype.primitive_bitwidth // 8

    def _places(self, coordinates: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns a tile's addresses (modulo 2^64), and whether each is inside the tensor."""
        place = np.zeros((1,) * len(self.block), np.uint64)
        inside = np.ones((1,) * len(self.block), np.bool_)
        for axis, at in enumerate(coordinates):
            along = int(as_value(at)) + np.arange(self.block[axis], dtype=np.int64)
            shape = [1] * len(self.block)
            shape[axis] = -1
            along = along.reshape(shape)
            inside = inside & (along >= 0) & (along < self.shape[axis])
            with np.errstate(over="ignore"):
                stride = np.uint64(self.strides[axis] % (1 << 64))
                place = place + along.astype(np.uint64) * stride
        place = np.broadcast_to(place, self.block).astype(np.int64) + self.memory.begin
        return place, np.broadcast_to(inside, self.block)

    def load(self, coordinates: Any) -> np.ndarray:
        place, inside = self._places(coordinates)
        tile = np.zeros(self.block, storage(self.dtype))
        tile[inside] = self.memory.load(place[inside])
        return tile

    def store(self, coordinates: Any, tile: np.ndarray, add: bool = False) -> None:
        place, inside = self._places(coordinates)
        values = tile.reshape(self.block)[inside]
        if add:
            values = values + self.memory.load(place[inside])
        self.memory.store(place[inside], values)
