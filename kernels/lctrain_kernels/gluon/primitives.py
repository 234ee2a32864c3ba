"""Device helpers of the Hopper kernels: recompiled portable helpers, PTX instructions, fences.

`gluon.jit(helper.fn)` compiles the source of a portable Triton helper as Gluon, with layouts. So
the dropout mask, windows and logits have one definition for all kernels. The other helpers are
instructions that Gluon does not offer, and scheduling fences against the compiler.
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
    """Compiles a portable helper as Gluon, and replaces the functions that it calls.

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


@gluon.jit
def rematerialised(buffers, index, opaque_false):
    """Returns buffers.index(index), and forces the compiler to compute its descriptor in the loop.

    Otherwise the compiler computes the shared-memory descriptors of constant buffers before the
    loop. They need more uniform registers than there are, so ptxas spills them to local memory.
    Each reload then waits behind the products' reads of shared memory.

    Args:
        buffers: Shared memory [.., rows, columns].
        index: Index of a buffer.
        opaque_false: Condition that is always false, but that the compiler cannot evaluate.
    """
    return buffers.index(index + gl.where(opaque_false, 1, 0))


@gluon.jit
def opaque(bits):
    """Returns 32-bit words unchanged, and hides from LLVM how they were computed.

    Otherwise LLVM computes the shifted lower half of each word a second time.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [bits], dtype=gl.uint32, is_pure=True, pack=1
    )


@gluon.jit
def drop_weights(p, bits, key, threshold):
    """Returns the weights p with dropped ones set to 0; see is_kept.

    `bits` are words that `opaque` returned. The function is PTX, because LLVM would collect all
    comparisons before the selects.
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
    """Rounds float32 to half precision, two values per instruction.

    Otherwise the compiler moves selects behind the rounding, and packs the halves by further
    instructions.
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
    """Returns p, and keeps its computation before the next wait for products.

    Otherwise ptxas moves that wait above the exponentials, which should overlap with the products.
    The scheduling fence is a barrier instruction that never runs and depends on all values of p.

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
def wait_bulk_writes(LATER: gl.constexpr):
    """Waits until this warp's copies from shared memory have been written to global memory.

    Gluon's own wait ends earlier, when the copies have read shared memory.

    Args:
        LATER: Number of the latest copies that may still be in flight, at most two.
    """
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    gl.inline_asm_elementwise(_WAITS[LATER], "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fence_release():
    """Issues a release fence at GPU scope: this warp's earlier writes become visible first."""
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
    """Atomically adds x0, x1, x2 and x3 to the four float32 at each address where left > 0.

    Addresses are multiples of 16 bytes. No thread waits for the additions, which complete before
    the kernel ends.
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
def load_scalar(buffer, warps: gl.constexpr):
    """Loads the element of a [1] buffer in shared memory."""
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
    """Returns (low, high): queries [first, first + positions) see key blocks [low, high)."""
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
    """Returns (low, high): query blocks [low, high) see keys [first, first + keys)."""
    end = length_q
    if HAS_LEFT:
        end = gl.minimum(end, gl.maximum(first + keys - shift + left, 0))
    high = (end + BLOCK_M - 1) // BLOCK_M
    low = 0
    if HAS_RIGHT:
        low = gl.minimum(gl.maximum(first - shift - right, 0) // BLOCK_M, high)
    return low, high
