"""Tests the arena of host memory: slots of any tensor, reuse, and pinning that fails."""

import ctypes
import gc

import pytest
import torch

from lctrain.memory import arena as arenas
from lctrain.memory.arena import ALIGNMENT, Arena


def test_slots_are_apart_and_come_back():
    arena = Arena(4 * 1000, pin=False)
    x = [torch.full((100,), float(number)) for number in range(4)]
    slots = [arena.reserve(400) for _ in x]
    for slot, value in zip(slots, x, strict=True):
        slot.view(value).copy_(value)
    assert all(torch.equal(slot.view(v), v) for slot, v in zip(slots, x, strict=True))
    assert arena.used == 4 * 448
    assert arena.reserve(4000) is None
    del slots[1:3], slot
    assert arena.used == 2 * 448
    large = arena.reserve(2 * 448)  # where the two were
    assert large is not None
    del slots, large
    assert arena.used == 0
    assert arena.reserve(4000 - 4000 % ALIGNMENT) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.bool])
def test_a_view_has_dtype_shape_and_strides(dtype):
    arena = Arena(10_000, pin=False)
    first = arena.reserve(3)  # the next slot begins behind an odd number of bytes
    like = torch.ones(6, 5, 4, dtype=dtype).transpose(0, 2)
    view = arena.reserve(like.numel() * like.element_size()).view(like)
    view.copy_(like)
    assert (view.dtype, view.shape, view.stride()) == (dtype, like.shape, like.stride())
    assert torch.equal(view, like)
    assert view.data_ptr() == first.view(torch.empty(3, dtype=torch.uint8)).data_ptr() + ALIGNMENT


def test_slots_that_are_collected_inside_reserve_change_no_range_there():
    """Python may collect an unreachable slot at any line, as between search and assignment."""
    arena = Arena(512, pin=False)
    slots = [arena.reserve(size) for size in (64, 128, 64, 128, 128)]

    class Collecting(list):
        def __setitem__(self, key, value):
            cycle.clear()  # the slots between two free ranges
            super().__setitem__(key, value)

    cycle = [slots[1], slots[2]]
    slots[0] = slots[1] = slots[2] = slots[3] = None
    assert arena.used == 512 - 64 - 128
    arena._free = Collecting(arena._free)
    first = arena.reserve(128)
    assert not cycle
    found = [first, *(arena.reserve(128) for _ in range(3))]
    begins = [one._bytes.storage_offset() for one in found if one is not None]
    assert len(set(begins)) == len(begins) == 3
    assert arena.used == 512


class Runtime:
    """Stands for CUDA's runtime; returns the given status."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.calls: list[tuple] = []

    def cudaHostRegister(self, address, size, flags):
        self.calls.append(("register", address, size))
        self.zero = not any((ctypes.c_char * size).from_address(address).raw)
        return self.status

    def cudaHostUnregister(self, address):
        self.calls.append(("unregister", address))

    def cudaGetLastError(self):
        self.calls.append(("clear",))

    def synchronize(self):
        self.calls.append(("synchronize",))


def test_the_bytes_that_are_pinned_are_those_of_the_arena(monkeypatch):
    runtime = Runtime(0)
    monkeypatch.setattr(arenas.torch.cuda, "cudart", lambda: runtime)
    arena = Arena(100_001, pin=True, stream=runtime)
    assert arena.pinned
    ((name, address, size),) = runtime.calls
    assert (name, size) == ("register", 100_001)
    assert address % arenas.PAGE == 0
    assert runtime.zero  # every page was written by all cores, which is faster than by pinning
    del arena
    gc.collect()
    assert runtime.calls[1:] == [("synchronize",), ("unregister", address)]


def test_pinning_that_fails_warns_and_goes_on(monkeypatch):
    runtime = Runtime(2)
    monkeypatch.setattr(arenas.torch.cuda, "cudart", lambda: runtime)
    with pytest.warns(UserWarning, match=r"cannot be pinned \(CUDA error 2\).*memory\.host_gib"):
        arena = Arena(1024, pin=True)
    assert not arena.pinned
    assert runtime.calls[1:] == [("clear",)]  # else the next kernel raises it
    assert arena.reserve(1000) is not None
