"""Tensors and scalars of an emulated kernel: numpy arrays with Triton's dtypes and promotion."""

import functools
from typing import Any

import numpy as np
from triton import language as tl

_STORAGE = {
    "fp64": np.float64,
    "fp32": np.float32,
    "bf16": np.float32,  # numpy has none; every value is one that bfloat16 has
    "fp16": np.float16,
    "uint64": np.uint64,
    "int64": np.int64,
    "uint32": np.uint32,
    "int32": np.int32,
    "uint16": np.uint16,
    "int16": np.int16,
    "uint8": np.uint8,
    "int8": np.int8,
    "int1": np.bool_,
}


def storage(dtype: tl.dtype) -> type:
    """Returns the numpy dtype that holds a Triton dtype."""
    return _STORAGE[dtype.name]


def round_bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounds float32 to the nearest bfloat16, ties to even, kept as float32."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(array), array, rounded.view(np.float32)).astype(np.float32)


def _cast(array: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    if dtype.name == "bf16":
        return round_bfloat16(np.asarray(array, np.float32))
    return np.asarray(array, storage(dtype))


@functools.cache
def _common(x: tl.dtype, y: tl.dtype) -> tl.dtype:
    """Returns the dtype of the result of an operation on two tensors, by Triton's promotion."""
    for first, second in ((x, y), (y, x)):
        if first.is_floating() and not second.is_floating():
            return first
    if x.is_floating():
        if x == y:
            return x
        wider = max(x, y, key=lambda dtype: dtype.primitive_bitwidth)
        return wider if wider.primitive_bitwidth > 16 else tl.float32
    widths = x.primitive_bitwidth, y.primitive_bitwidth
    if widths[0] != widths[1]:
        return x if widths[0] > widths[1] else y
    return x if x.is_int_unsigned() else y


class Value:
    """A tensor of an emulated kernel, or a scalar as a tensor without dimensions.

    Nothing writes into `array`, which other values may share.
    """

    def __init__(self, array: Any, dtype: tl.dtype):
        self.array = np.asarray(array, _STORAGE[dtype.name])
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def to(self, dtype: tl.dtype, bitcast: bool = False) -> "Value":
        """Converts to a dtype, or reinterprets the bits if `bitcast` is true."""
        if bitcast:
            return Value(self.array.view(storage(dtype)), dtype)
        if dtype is self.dtype:
            return self
        array = self.array
        if array.dtype.kind == "f" and not dtype.is_floating():
            array = np.trunc(array)
        return Value(_cast(array, dtype), dtype)

    def __getitem__(self, index: Any) -> "Value":
        return Value(self.array[index], self.dtype)

    def __bool__(self) -> bool:
        return bool(self.array)

    def __index__(self) -> int:
        return int(self.array)

    def like(self, other: Any) -> "Value":
        """Converts a Python number to a Value, in this tensor's dtype if that can hold it."""
        if isinstance(other, Value):
            return other
        if isinstance(other, float) and not self.dtype.is_floating():
            return Value(other, tl.float32)
        if isinstance(other, (bool, np.bool_)):
            return Value(other, tl.int1)
        if self.dtype.is_floating():
            return Value(_cast(np.asarray(other), self.dtype), self.dtype)
        dtype = tl.int32 if self.dtype == tl.int1 else self.dtype
        bits = dtype.primitive_bitwidth
        if dtype.is_int_unsigned():
            other &= (1 << bits) - 1
        elif not -(1 << bits - 1) <= other < 1 << bits - 1:
            dtype = tl.int64
        return Value(other, dtype)

    def apply(self, other: Any, function: Any, swap: bool = False) -> "Value":
        x, y = self, self.like(other)
        dtype = x.dtype if x.dtype is y.dtype else _common(x.dtype, y.dtype)
        first = x.array if x.dtype is dtype else _cast(x.array, dtype)
        second = y.array if y.dtype is dtype else _cast(y.array, dtype)
        if swap:
            first, second = second, first
        result = np.asarray(function(first, second))
        if result.dtype == np.bool_ and dtype != tl.int1:
            return Value(result, tl.int1)
        return Value(_cast(result, dtype), dtype)

    def __add__(self, other):
        return self.apply(other, np.add)

    __radd__ = __add__

    def __sub__(self, other):
        return self.apply(other, np.subtract)

    def __rsub__(self, other):
        return self.apply(other, np.subtract, swap=True)

    def __mul__(self, other):
        return self.apply(other, np.multiply)

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self.apply(other, np.divide)

    def __rtruediv__(self, other):
        return self.apply(other, np.divide, swap=True)

    def __floordiv__(self, other):
        return self.apply(other, _divide)

    def __rfloordiv__(self, other):
        return self.apply(other, _divide, swap=True)

    def __mod__(self, other):
        return self.apply(other, _remainder)

    def __rmod__(self, other):
        return self.apply(other, _remainder, swap=True)

    def __lshift__(self, other):
        return self.apply(other, np.left_shift)

    def __rshift__(self, other):
        return self.apply(other, np.right_shift)

    def __and__(self, other):
        return self.apply(other, np.bitwise_and)

    __rand__ = __and__

    def __or__(self, other):
        return self.apply(other, np.bitwise_or)

    __ror__ = __or__

    def __xor__(self, other):
        return self.apply(other, np.bitwise_xor)

    __rxor__ = __xor__

    def __neg__(self):
        return Value(-self.array, self.dtype)

    def __invert__(self):
        return Value(~self.array, self.dtype)

    def __lt__(self, other):
        return self.apply(other, np.less)

    def __le__(self, other):
        return self.apply(other, np.less_equal)

    def __gt__(self, other):
        return self.apply(other, np.greater)

    def __ge__(self, other):
        return self.apply(other, np.greater_equal)

    def __eq__(self, other):
        return self.apply(other, np.equal)

    def __ne__(self, other):
        return self.apply(other, np.not_equal)

    __hash__ = None


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Divides integers towards zero, as C does."""
    quotient = np.floor_divide(x, y)
    return quotient + ((quotient < 0) & (quotient * y != x)).astype(quotient.dtype)


def _remainder(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x - _divide(x, y) * y


def as_value(x: Any) -> Value:
    """Converts a Python number that is a kernel argument to a Value."""
    if isinstance(x, Value):
        return x
    if isinstance(x, (bool, np.bool_)):
        return Value(x, tl.int1)
    if isinstance(x, float):
        return Value(x, tl.float32)
    return Value(x, tl.int32 if -(1 << 31) <= x < 1 << 31 else tl.int64)


def elementwise(function: Any) -> Any:
    """Returns a function that applies `function` to a Value's elements, and rounds to its dtype."""

    def apply(x: Any) -> Value:
        x = as_value(x)
        return Value(_cast(function(x.array), x.dtype), x.dtype)

    return apply
