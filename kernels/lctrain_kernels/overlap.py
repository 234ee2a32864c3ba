"""share_memory, repeats_memory: whether two elements of strided tensors have one address.

meeting_rows: which rows of two tensors have an address in common.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

_Layout = tuple[tuple[int, ...], tuple[int, ...]]  # strides, shape


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Returns whether an element of one tensor has the address of an element of the other.

    Views that interleave, such as `cache.unbind(2)`, share a storage but no address. No value is
    read.

    Args:
        first: A tensor of any strides.
        second: A tensor of the dtype of `first`.
    """
    if not first.numel() or not second.numel():
        return False
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return False
    distance = second.storage_offset() - first.storage_offset()
    layouts = (first.stride(), tuple(first.shape)), (second.stride(), tuple(second.shape))
    return _meet(*layouts, distance)


def meeting_rows(first: Tensor, second: Tensor) -> list[int]:
    """Returns each d for which row r of one tensor and row r + d of the other share memory.

    In a pool whose pages hold keys and values by turns, `pool[:-1]` and `pool[1:]` meet at -1 only.

    Args:
        first: A tensor of at least one dimension; its rows may have any strides.
        second: A tensor with the strides, the dtype and the shape of rows of `first`.
    """
    if not share_memory(first, second):
        return []
    distance, stride = second.storage_offset() - first.storage_offset(), first.stride(0)
    pairs = zip(first.stride()[1:], first.shape[1:], strict=True)
    reach = sum(step * (size - 1) for step, size in pairs)
    low, high = 1 - len(first), len(second) - 1
    if stride:
        low = max(low, -((reach + distance) // stride))
        high = min(high, (reach - distance) // stride)
    numbers = range(low, high + 1)
    return [d for d in numbers if share_memory(first[max(-d, 0)], second[max(d, 0)])]


@lru_cache(maxsize=1024)
def _meet(first: _Layout, second: _Layout, distance: int) -> bool:
    """Returns whether two layouts have an element in common, at a distance of their beginnings."""
    ranges: dict[int, tuple[int, int]] = {}
    for (strides, shape), sign in ((first, 1), (second, -1)):
        for stride, size in zip(strides, shape, strict=True):
            low, high = ranges.get(stride, (0, 0))
            ranges[stride] = (low, high + size - 1) if sign > 0 else (low - size + 1, high)
    terms = tuple(sorted(((t, *indices) for t, indices in ranges.items()), reverse=True))
    return _reaches(distance, terms)


def repeats_memory(tensor: Tensor) -> bool:
    """Returns whether two elements of a tensor have one address, as in an expanded tensor."""
    return _repeats(tensor.stride(), tuple(tensor.shape))


@lru_cache(maxsize=256)
def _repeats(strides: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if 0 in shape:
        return False
    pairs = zip(strides, shape, strict=True)
    dimensions = sorted(((stride, size) for stride, size in pairs if size > 1), reverse=True)
    for place, (stride, size) in enumerate(dimensions):
        # Elements whose indices differ in this dimension, and in none before it.
        rest = tuple((t, 1 - n, n - 1) for t, n in dimensions[place + 1 :])
        if _reaches(0, ((stride, 1, size - 1), *rest)):
            return True
    return False


def _reaches(distance: int, terms: tuple[tuple[int, int, int], ...]) -> bool:
    """Returns whether a distance is a sum of stride * index, with each index in its range.

    Of each index, only values are tried with which the other terms can still reach the distance. In
    a dense tensor these are two.

    Args:
        distance: Number of elements.
        terms: (stride, least index, largest index) of each dimension, the largest stride first.
    """
    if not terms:
        return distance == 0
    (stride, least, most), *others = terms
    rest = tuple(others)
    if stride == 0:
        return distance == 0
    low = sum(t * first for t, first, _ in rest)
    high = sum(t * last for t, _, last in rest)
    first = max(least, -((high - distance) // stride))
    last = min(most, (distance - low) // stride)
    return any(_reaches(distance - stride * index, rest) for index in range(first, last + 1))
