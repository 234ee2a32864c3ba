"""Device helpers of the Hopper kernels: PTX instructions, scheduling fences, and portable helpers.

`gluon.jit(helper.fn)` compiles the source of a portable Triton helper as Gluon. So the dropout
mask, windows and logits have one definition for all kernels. The other helpers are instructions
that Gluon does not offer, and fences that keep ptxas from reordering instructions.
"""

from types import FunctionType
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lctrain_kernels.tile import dropout, mask
from lctrain_kernels.tile import logits as logits_tile

draw_bits = gluon.jit(dropout.draw_bits.fn)
top_bits = gluon.jit(dropout.top_bits.fn)
load_key = gluon.jit(dropout.load_key.fn)
dropout_head = gluon.jit(dropout.dropout_head.fn)
load_window = gluon.jit(mask.load_window.fn)
tanh = gluon.jit(logits_tile.tanh.fn)


def with_callees(helper: Any, **callees: Any) -> Any:
    """Compiles a portable Triton helper as Gluon, and replaces the functions that it calls.

    Args:
        helper: Function decorated with triton.jit.
        callees: Name of a called function in the helper's source -> Gluon function that replaces
            it.
    """
    source = helper.fn
    names = source.__globals__ | callees
    return gluon.jit(FunctionType(source.__code__, names, source.__name__, source.__defaults__))


is_kept = with_callees(dropout.is_kept, top_bits=top_bits)
_WAITS = gl.constexpr(
    tuple(f"cp.async.bulk.wait_group {later}; mov.b32 $0, $1;" for later in range(3))
)
_PAIRS = range(16)  # of halves that a thread has of 64 x 64
_FINISHED = gl.constexpr(
    "{ .reg .pred go; .reg .b32 x, three; mov.b32 three, 3; mov.b32 x, 0; "
    + " ".join(f"xor.b32 x, x, ${16 + pair};" for pair in _PAIRS)
    + " setp.ne.s32 go, $32, 0; setp.eq.and.b32 go, x, 1, go; @go bar.sync three, 256; "
    + " ".join(f"mov.b32 ${pair}, ${16 + pair};" for pair in _PAIRS)
    + " }"
)
_FINISHED_CONSTRAINTS = gl.constexpr(",".join(["=&r"] * 16 + ["r"] * 48))

_VALUES = range(32)  # float32 numbers of a thread that one fence takes
_COMPUTED = gl.constexpr(
    "{ .reg .pred go; .reg .b32 x, y, three; mov.b32 three, 3; mov.b32 x, 0; "
    + " ".join(f"mov.b32 y, ${32 + value}; xor.b32 x, x, y;" for value in _VALUES)
    + " setp.ne.s32 go, $64, 0; setp.eq.and.b32 go, x, 1, go; @go bar.sync three, 256; }"
)
_COMPUTED_CONSTRAINTS = gl.constexpr(
    ",".join(["=f"] * 32 + [str(value) for value in _VALUES] + ["r"] * 32)
)


@gluon.jit
def rematerialised(buffers, index, opaque_false):
    """Returns buffers.index(index), with its shared-memory descriptor computed inside the loop.

    Otherwise the compiler computes the descriptors of constant buffers before the loop. They need
    more uniform registers than there are, so ptxas spills them to local memory. Each reload then
    waits behind the products' reads of shared memory.

    Args:
        buffers: Shared memory [n, rows, columns].
        index: Index of a buffer.
        opaque_false: Condition that is always false, but that the compiler cannot evaluate.
    """
    return buffers.index(index + gl.where(opaque_false, 1, 0))


@gluon.jit
def opaque(bits):
    """Returns 32-bit words unchanged, through an instruction that LLVM cannot see through.

    Otherwise LLVM computes the shifted lower half of each word a second time.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [bits], dtype=gl.uint32, is_pure=True, pack=1
    )


@gluon.jit
def drop_weights(p, bits, key, threshold):
    """Returns the weights p with dropped ones set to 0.

    The function is PTX, because LLVM would collect all comparisons before the selects.

    Args:
        p: Weights, float32.
        bits: One random word per weight, uint32, that `opaque` returned.
        key: Positions of keys inside the tile, broadcastable to p.
        threshold: A weight is dropped if the 16 bits taken from its word are below this number.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred kept; setp.ge.u32 kept, $2, $3; selp.f32 $0, $1, 0f00000000, kept; }",
        "=f,f,r,r",
        [p, top_bits(bits, key), threshold.to(gl.uint32) << 16],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def rounded(x, dtype: gl.constexpr):
    """Returns float32 values rounded to half precision, by an instruction that rounds two values.

    Otherwise the compiler moves selects behind the rounding, and packs the halves by further
    instructions.

    Args:
        x: Values, float32; adjacent registers are rounded together.
        dtype: bfloat16 or float16.
    """
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def scheduling_fence(p, opaque_false):
    """Returns p unchanged, as a fence against instruction scheduling by ptxas.

    The next wait for products stays behind p's computation. Without the fence, ptxas moves it above
    the exponentials, which should overlap with the products. The fence is a barrier instruction
    that never runs and depends on all values of p.

    Args:
        p: Weights of a warpgroup, [64, 64], in half precision.
        opaque_false: Condition that is always false, but that the compiler cannot evaluate.
    """
    return gl.inline_asm_elementwise(
        _FINISHED,
        _FINISHED_CONSTRAINTS,
        [p, gl.where(opaque_false, 1, 0)],
        dtype=p.dtype,
        is_pure=False,
        pack=32,
    )


@gluon.jit
def computed(p, opaque_false):
    """Returns p, and keeps its computation before the next wait for products.

    This is scheduling_fence for weights in float32.

    Args:
        p: Weights of a warpgroup in float32, [64, 64] or [64, 128].
        opaque_false: Condition that is always false, but that the compiler cannot evaluate.
    """
    return gl.inline_asm_elementwise(
        _COMPUTED,
        _COMPUTED_CONSTRAINTS,
        [p, gl.where(opaque_false, 1, 0)],
        dtype=p.dtype,
        is_pure=False,
        pack=32,
    )


@gluon.jit
def wait_bulk_writes(LATER: gl.constexpr):
    """Waits until this warp's TMA copies from shared memory are written to global memory.

    Gluon's own wait ends earlier, when the copies have read shared memory.

    Args:
        LATER: Number of the latest copies that may still be in flight, at most two.
    """
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    gl.inline_asm_elementwise(_WAITS[LATER], "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fence_release():
    """Issues a release fence at GPU scope.

    A program that sees a later write of this warp also sees the warp's writes before the fence.
    """
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    gl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.b32 $0, $1;",
        "=r,r",
        [lane],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def red_add_v4(pointers, left, x0, x1, x2, x3):
    """Atomically adds four float32 per thread to global memory, in one vector instruction.

    No thread waits for the additions, which complete before the kernel ends.

    Args:
        pointers: Address of the first of four float32, a multiple of 16 bytes.
        left: Nothing is added where this number is 0 or less.
        x0: Number to add to the first float32.
        x1: Number to add to the second float32.
        x2: Number to add to the third float32.
        x3: Number to add to the fourth float32.
    """
    gl.inline_asm_elementwise(
        "{ .reg .pred some; setp.gt.s32 some, $2, 0; "
        "@some red.relaxed.gpu.global.add.v4.f32 [$1], {$3, $4, $5, $6}; mov.b32 $0, 0; }",
        "=r,l,r,f,f,f,f",
        [pointers.to(gl.int64), left, x0, x1, x2, x3],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def red_add_v2(pointers, left, x0, x1):
    """Atomically adds two float32 per thread to global memory; see red_add_v4.

    Args:
        pointers: Address of the first of two float32, a multiple of 8 bytes.
        left: Nothing is added where this number is 0 or less.
        x0: Number to add to the first float32.
        x1: Number to add to the second float32.
    """
    gl.inline_asm_elementwise(
        "{ .reg .pred some; setp.gt.s32 some, $2, 0; "
        "@some red.relaxed.gpu.global.add.v2.f32 [$1], {$3, $4}; mov.b32 $0, 0; }",
        "=r,l,r,f,f",
        [pointers.to(gl.int64), left, x0, x1],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_scalar(buffer, warps: gl.constexpr):
    """Returns the element of a [1] buffer in shared memory, which `warps` warps read together."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [warps], [0])
    return gl.max(buffer.load(layout), 0)


@gluon.jit
def key_blocks(
    first,
    positions,
    shift,
    length_k,
    left,
    right,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Returns the range (low, high) of blocks of keys that a tile of queries sees.

    Queries [first, first + positions) see no key outside of blocks [low, high). The arguments are
    those of tile.mask.key_ranges.
    """
    end = length_k
    if HAS_RIGHT:
        end = gl.minimum(end, gl.maximum(first + positions + shift + right, 0))
    high = (end + BLOCK_N - 1) // BLOCK_N
    low = 0
    if HAS_LEFT:
        low = gl.minimum(gl.maximum(first + shift - left, 0) // BLOCK_N, high)
    return low, high


@gluon.jit
def query_blocks(
    first,
    keys,
    shift,
    length_q,
    left,
    right,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """Returns the range (low, high) of blocks of queries that see a tile of keys.

    No query outside of blocks [low, high) sees any of the keys [first, first + keys). The arguments
    are those of tile.mask.query_ranges.
    """
    end = length_q
    if HAS_LEFT:
        end = gl.minimum(end, gl.maximum(first + keys - shift + left, 0))
    high = (end + BLOCK_M - 1) // BLOCK_M
    low = 0
    if HAS_RIGHT:
        low = gl.minimum(gl.maximum(first - shift - right, 0) // BLOCK_M, high)
    return low, high
