"""Arena: one large block of host memory, pinned for a GPU, that is divided into slots."""

from __future__ import annotations

import contextlib
import ctypes
import warnings
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; a copy of aligned memory is at full speed, and every dtype fits
PAGE = 4096


class Arena:
    """A block of host memory that hands out slots of any size, and reuses released slots.

    torch's own allocator of pinned memory rounds every block up to a power of two. The arena pins
    ordinary memory instead, and so takes only `capacity` bytes. If pinning fails, the arena warns
    and stays unpinned: copies are slower, and results do not change.

    Attributes:
        capacity: Size of the block, in bytes.
        pinned: Whether the block is pinned.

    Args:
        capacity: Size of the block, in bytes.
        pin: Whether to pin the block, for copies from and to a GPU.
        stream: CUDA stream of the copies from and to the arena, which must end before the block is
            unpinned; None without a GPU.
    """

    def __init__(self, capacity: int, pin: bool, stream: Any = None) -> None:
        self.capacity = capacity
        self._stream = stream
        self._used = 0
        self._released: deque[tuple[int, int]] = deque()  # (begin, size) of collected slots
        memory = torch.empty(capacity + PAGE, dtype=torch.uint8, device="cpu")
        begin = -memory.data_ptr() % PAGE
        self._memory = memory[begin : begin + capacity]
        self._free = [(0, capacity)]  # ranges of bytes, in order and apart
        self.pinned = pin and self._pin(memory)

    @property
    def used(self) -> int:
        """Number of bytes in slots that are in use."""
        self._merge_released()
        return self._used

    def _pin(self, memory: Tensor) -> bool:
        """Pins the block until the arena is garbage-collected. Returns whether that succeeded."""
        runtime: Any = torch.cuda.cudart()
        address = self._memory.data_ptr()
        self._memory.zero_()  # all cores get the pages from the system; pinning would use one core
        try:
            status = int(runtime.cudaHostRegister(address, self.capacity, 0))
        except RuntimeError as error:
            status, reason = 1, str(error).splitlines()[0]
        else:
            reason = f"CUDA error {status}"
        if status != 0:
            _clear_error(runtime)
            warnings.warn(
                f"{self.capacity / 2**30:.1f} GiB of host memory cannot be pinned ({reason}): "
                "copies to the host are slower. Lower memory.host_gib, or raise the limit of "
                "locked memory.",
                stacklevel=2,
            )
            return False
        weakref.finalize(self, _unpin, runtime, address, memory, self._stream)
        return True

    def reserve(self, size: int) -> Slot | None:
        """Returns a slot of `size` bytes; None if no free range is large enough."""
        self._merge_released()
        needed = aligned(size)
        for index, (begin, end) in enumerate(self._free):
            if end - begin < needed:
                continue
            rest = [(begin + needed, end)] if end - begin > needed else []
            self._free[index : index + 1] = rest
            self._used += needed
            return Slot(self, begin, size)
        return None

    def release(self, begin: int, size: int) -> None:
        """Records that a slot was garbage-collected. The next `reserve` or `used` frees its bytes.

        Python may collect a slot during any allocation, even while `reserve` runs. Therefore this
        method does not change the list of free ranges.
        """
        self._released.append((begin, size))

    def _merge_released(self) -> None:
        """Makes the bytes of released slots free again, and joins adjacent free ranges."""
        if not self._released:
            return
        ranges = list(self._free)
        while self._released:
            begin, size = self._released.popleft()
            ranges.append((begin, begin + aligned(size)))
            self._used -= aligned(size)
        ranges.sort()
        joined = ranges[:1]
        for first, last in ranges[1:]:
            if first == joined[-1][1]:
                joined[-1] = (joined[-1][0], last)
            else:
                joined.append((first, last))
        self._free = joined

    def bytes_of(self, begin: int, size: int) -> Tensor:
        """Returns bytes of the block, [size] uint8, as a view."""
        return self._memory[begin : begin + size]


class Slot:
    """A range of bytes of an arena, which is released when no object refers to the slot.

    Args:
        arena: The arena.
        begin: First byte of the slot in the arena's block.
        size: Number of bytes that were requested.
    """

    def __init__(self, arena: Arena, begin: int, size: int) -> None:
        self._bytes = arena.bytes_of(begin, size)
        weakref.finalize(self, arena.release, begin, size).atexit = False

    def view(self, like: Tensor) -> Tensor:
        """Returns the slot as a tensor with dtype, shape and strides of a dense tensor `like`."""
        return self._bytes.view(like.dtype).as_strided(like.shape, like.stride())


def aligned(size: int) -> int:
    """Returns the bytes that a slot of `size` bytes occupies: `size` rounded up to ALIGNMENT."""
    return -(-max(size, 1) // ALIGNMENT) * ALIGNMENT


def _clear_error(runtime: Any) -> None:
    """Resets CUDA's last error, which the check after the next kernel would raise."""
    if not hasattr(runtime, "cudaGetLastError"):  # torch binds a part of the runtime
        major = (torch.version.cuda or "").partition(".")[0]
        with contextlib.suppress(OSError):  # the library that torch has loaded
            runtime = ctypes.CDLL(f"libcudart.so.{major}")
    if hasattr(runtime, "cudaGetLastError"):
        runtime.cudaGetLastError()


def _unpin(runtime: Any, address: int, memory: Tensor, stream: Any) -> None:
    """Unpins a block of host memory after its copies have ended."""
    if stream is not None:
        stream.synchronize()
    runtime.cudaHostUnregister(address)
