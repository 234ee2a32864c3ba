"""Implements `gl`, `tl`, `mbarrier` and the functions of compat.py for the emulator.

A kernel's source sees these names instead of Triton's.
"""

import math
import re
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from triton import language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from lctrain_kernels.gluon import compat
from tests.kernels.gluon_emulator.assembly import run_on_rows
from tests.kernels.gluon_emulator.machine import (
    Barrier,
    Operation,
    current,
    fence,
    issue_product,
)
from tests.kernels.gluon_emulator.memory import Buffer, Descriptor, Pointer
from tests.kernels.gluon_emulator.values import Value, as_value, elementwise, storage

_ROUNDINGS = {
    "cvt.rn.bf16x2.f32 $0, $2, $1;": "bf16",
    "cvt.rn.f16x2.f32 $0, $2, $1;": "fp16",
}


class BarrierArray:
    """An array of mbarriers in shared memory; an array of one acts as that mbarrier."""

    def __init__(self, barriers: list[Barrier]):
        self.barriers = barriers

    def index(self, i: Any) -> "BarrierArray":
        return BarrierArray([self.barriers[int(as_value(i))]])

    @property
    def only(self) -> Barrier:
        assert len(self.barriers) == 1
        return self.barriers[0]


def allocate_shared_memory(
    dtype: tl.dtype, shape: list, layout: Any, value: Any = None
) -> Buffer | BarrierArray:
    if isinstance(layout, hopper.mbarrier.MBarrierLayout):
        return BarrierArray([Barrier() for _ in range(math.prod(shape[:-1]))])
    fill = np.nan if dtype.is_floating() else -(1 << 30)
    flat = np.full(math.prod(shape), fill, storage(dtype))
    buffer = Buffer.view(flat, shape, dtype, layout)
    if value is not None:
        buffer.store(value)
    return buffer


def where(condition: Any, x: Any, y: Any) -> Value:
    if not isinstance(x, Value) and isinstance(y, Value):
        x = y.like(x)
    x = as_value(x)
    y = x.like(y)
    dtype = x.dtype if x.dtype is y.dtype else (x + y).dtype
    chosen = np.where(as_value(condition).array, x.to(dtype).array, y.to(dtype).array)
    return Value(chosen, dtype)


def arange(start: int, end: int, layout: Any = None) -> Value:
    return Value(np.arange(start, end), tl.int32)


def full(shape: Any, value: Any, dtype: tl.dtype, layout: Any = None) -> Value:
    filled = np.broadcast_to(as_value(value).to(dtype).array, [int(size) for size in shape])
    return Value(filled.copy(), dtype)


def zeros(shape: Any, dtype: tl.dtype, layout: Any = None) -> Value:
    return full(shape, 0, dtype)


def zeros_like(x: Value) -> Value:
    return zeros(x.shape, x.dtype)


def load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Value:
    return pointer.load(mask, other)


def store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    pointer.store(value, mask)
    current().machine.writes += 1


def atomic_add(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> Value:
    """Adds to global memory, and returns the values before.

    Adding zero is a poll: a second poll of an unchanged address waits for some thread's write.
    """
    thread, machine = current(), current().machine
    polls = not isinstance(value, Value) and value == 0
    address = (id(pointer.memory), int(pointer.place)) if polls else None
    before = thread.polled
    if polls and before is not None and before[0] == address:
        seen = before[1]
        machine.look(lambda: machine.writes != seen)
    else:
        machine.look()
    thread.polled = (address, machine.writes) if polls else None
    found = pointer.load(mask)
    if not polls:
        pointer.store(found + value, mask)
        machine.writes += 1
    return found


def inline_asm_elementwise(
    asm: str, constraints: str, args: list, dtype: Any, is_pure: bool, pack: int
) -> Any:
    wait = re.match(r"cp\.async\.bulk\.wait_group (\d+);", asm)
    if wait:
        current().finish_writes(int(wait[1]))
        return args[0]
    if "red.relaxed.gpu.global.add.v4.f32 [$1], {$3, $4, $5, $6}" in asm:
        return _red_add(*args)
    if "red.relaxed.gpu.global.add.v2.f32 [$1], {$3, $4}" in asm:
        return _red_add(*args)
    if asm.startswith("fence.acq_rel.gpu;"):
        return args[0]
    if "@go bar.sync three, 256;" in asm:
        assert not args[1].array.any(), "a barrier that never comes to be"
        return args[0]
    if asm == "mov.b32 $0, $1;":
        return args[0]
    if "setp.ge.u32 kept, $2, $3; selp.f32 $0, $1, 0f00000000, kept;" in asm:
        return where(args[1] >= args[2], args[0], 0.0)
    if "vote.sync" in asm:
        found = run_on_rows(asm, constraints, pack, [as_value(x).array for x in args])
        kinds = dtype if isinstance(dtype, tuple) else (dtype,)
        results = tuple(Value(x, kind) for x, kind in zip(found, kinds, strict=True))
        return results if isinstance(dtype, tuple) else results[0]
    named = re.search(r"@go bar\.(sync|arrive) \$1, \$2;", asm)
    if named:
        number, threads, wanted = (only_value(x) for x in args)
        if wanted:
            barrier = current().program.named[number]
            now = barrier.come(args[0].array.size, threads)
            waits = named[1] == "sync"
            current().machine.look((lambda: barrier.rounds != now) if waits else None)
        return args[0]
    assert _ROUNDINGS[asm] == dtype.name
    return args[0].to(dtype)


def only_value(x: Value) -> int:
    """Returns the element of a tensor as an int; all elements must be equal."""
    assert (x.array == x.array.flat[0]).all()
    return int(x.array.flat[0])


def _red_add(pointers: Pointer, left: Value, *values: Value) -> Value:
    """Emulates red_add_v2 and red_add_v4: adds numbers at each address where `left` is positive."""
    first = pointers.place.array
    some = np.broadcast_to(left.array > 0, first.shape)
    aligned = pointers.memory.address + first[some] * pointers.memory.flat.itemsize
    assert (aligned % (4 * len(values)) == 0).all(), "an address is not aligned"
    for i, value in enumerate(values):
        place = first[some] + i
        found = pointers.memory.load(place)
        pointers.memory.store(place, found + value.array[some])
    assert len(np.unique(first[some])) == some.sum(), "two threads add to one address"
    current().machine.look()
    return left


def split(x: Value) -> tuple[Value, Value]:
    return Value(x.array[..., 0], x.dtype), Value(x.array[..., 1], x.dtype)


def join(x: Value, y: Value) -> Value:
    return Value(np.stack((x.array, y.array), axis=-1), x.dtype)


def permute(x: Value, order: Any) -> Value:
    return Value(x.array.transpose(order), x.dtype)


def reshape(x: Value, shape: Any) -> Value:
    return Value(x.array.reshape([int(size) for size in shape]), x.dtype)


def warp_specialize(partitions: list, warps: list, registers: list) -> None:
    assert len(partitions) == len(warps) + 1 == len(registers) + 1 or len(partitions) == 1
    parent = current()
    threads = [
        parent.machine.start(parent.program, lambda f=function, a=arguments: f(*a))
        for function, arguments in partitions
    ]
    parent.machine.look(lambda: all(thread.done for thread in threads))
    assert not any(barrier.came for barrier in parent.program.named), (
        "an arrival at a barrier is left over"
    )


def program_id(axis: int) -> Value:
    return Value(current().program.index[axis], tl.int32)


def num_programs(axis: int) -> Value:
    return Value(current().program.grid[axis], tl.int32)


def _reduction(function: Callable) -> Callable:
    return lambda x, axis: Value(function(x.array, axis=axis), x.dtype)


def _binary(function: Callable) -> Callable:
    return lambda x, y: as_value(x).apply(y, function)


def _check(condition: Any, message: str = "") -> None:
    assert condition, message


LANGUAGE = types.SimpleNamespace(
    **{
        name: getattr(gl, name)
        for name in dir(gl)
        if isinstance(getattr(gl, name), tl.dtype) or name.endswith("Layout")
    },
    abs=elementwise(np.abs),
    allocate_shared_memory=allocate_shared_memory,
    arange=arange,
    atomic_add=atomic_add,
    cast=lambda x, dtype, bitcast=False: as_value(x).to(dtype, bitcast),
    cdiv=lambda x, y: (x + (y - 1)) // y,
    constexpr=lambda x: x,
    convert_layout=lambda x, layout, assert_trivial=False: x,
    cos=elementwise(np.cos),
    exp2=elementwise(np.exp2),
    floor=elementwise(np.floor),
    full=full,
    inline_asm_elementwise=inline_asm_elementwise,
    join=join,
    load=load,
    log2=elementwise(np.log2),
    max=_reduction(np.max),
    maximum=_binary(np.fmax),
    min=_reduction(np.min),
    minimum=_binary(np.fmin),
    num_programs=num_programs,
    permute=permute,
    program_id=program_id,
    reshape=reshape,
    sin=elementwise(np.sin),
    split=split,
    static_assert=_check,
    static_range=range,
    store=store,
    sum=_reduction(np.sum),
    warp_specialize=warp_specialize,
    where=where,
    zeros=zeros,
    zeros_like=zeros_like,
)


def _init(barrier: BarrierArray, count: int) -> None:
    barrier.only.init(count)


def _expect(barrier: BarrierArray, bytes: Any, pred: Any = True) -> None:
    if pred:
        barrier.only.change(arrivals=1, expected=int(as_value(bytes)))
    current().machine.look()


def _arrive(barrier: BarrierArray, *, count: int = 1, pred: Any = True) -> None:
    if pred:
        barrier.only.change(arrivals=count)
    current().machine.look()


def _wait(barrier: BarrierArray, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    parity = int(as_value(phase))
    assert parity in (0, 1)
    if pred:
        current().machine.look(lambda: barrier.only.phase != parity)


MBARRIER = types.SimpleNamespace(
    MBarrierLayout=hopper.mbarrier.MBarrierLayout,
    init=_init,
    expect=_expect,
    arrive=_arrive,
    wait=_wait,
)


def _tma_load(
    desc: Descriptor, coord: list, barrier: BarrierArray, result: Buffer, pred: Any = True
) -> None:
    assert result.shape == desc.block

    def copy() -> None:
        result.write(desc.load(coord))
        barrier.only.change(expected=-desc.bytes)

    if pred:
        current().machine.post(copy)
    current().machine.look()


def _tma_out(add: bool) -> Callable:
    def copy_out(desc: Descriptor, coord: list, src: Buffer) -> None:
        assert src.shape == desc.block
        src.show()
        tile: list[np.ndarray] = []
        read = Operation(lambda: tile.append(src.read()))

        def write() -> None:
            read.run()
            desc.store(coord, tile[0], add)

        current().reads.append(read)
        current().writes.append(current().machine.post(write))
        current().machine.look()

    return copy_out


def _copy_async(smem: Buffer, pointer: Pointer, mask: Any = None) -> None:
    """Copies to shared memory; elements that the mask excludes become zero."""
    current().small_copies.append(lambda: smem.write(pointer.load(mask, 0).array))


def _copy_arrive(barrier: BarrierArray, increment_count: bool = True) -> None:
    copies, current().small_copies = current().small_copies, []
    if increment_count:
        barrier.only.change(arrivals=-1)

    def arrive() -> None:
        for copy in copies:
            copy()
        barrier.only.change(arrivals=1)

    current().machine.post(arrive)


class Product:
    """The accumulator of an asynchronous product, whose value is known once the product has run."""

    def __init__(self, pending: list, shape: tuple[int, ...]):
        self.pending = pending
        self.shape = shape

    def value(self) -> Value:
        return Value(self.pending[0], tl.float32)


def _warpgroup_mma(
    a: Any, b: Buffer, acc: Any, *, use_acc: Any = True, is_async: bool = False, **_: Any
) -> Any:
    for operand in (a, b):
        if isinstance(operand, Buffer):
            operand.show()
    assert a.dtype == b.dtype
    shape = (a.shape[0], b.shape[1])
    assert a.shape[1] == b.shape[0]
    assert acc.shape == shape

    def product() -> np.ndarray:
        left, right = (x.read() if isinstance(x, Buffer) else x.array for x in (a, b))
        result = left.astype(np.float32, copy=False) @ right.astype(np.float32, copy=False)
        if use_acc:
            result = result + (acc.value() if isinstance(acc, Product) else acc).array
        return result

    pending = Product(issue_product(product), shape)
    return pending if is_async else _warpgroup_mma_wait(0, [pending])


def _warpgroup_mma_wait(num_outstanding: int = 0, deps: Any = ()) -> Any:
    current().finish_products(num_outstanding)
    values = tuple(x.value() if isinstance(x, Product) else x for x in deps)
    return values[0] if len(values) == 1 else values


def _tma_store_wait(pendings: int) -> None:
    current().finish_reads(pendings)


# Functions of Gluon as kernels import them, and what stands for them.
REPLACED: dict[Any, Any] = {
    hopper.fence_async_shared: lambda cluster=False: fence(),
    hopper.warpgroup_mma: _warpgroup_mma,
    hopper.warpgroup_mma_wait: _warpgroup_mma_wait,
    compat.copy_arrive: _copy_arrive,
    compat.copy_async: _copy_async,
    compat.partition_barrier: lambda: None,
    compat.reinterpret: Buffer.reinterpret,
    compat.tma_add: _tma_out(add=True),
    compat.tma_load: _tma_load,
    compat.tma_store: _tma_out(add=False),
    compat.tma_store_wait: _tma_store_wait,
    hopper.mbarrier: MBARRIER,
    gl: LANGUAGE,
    tl: LANGUAGE,
}
