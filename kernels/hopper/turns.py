"""Turns in which warpgroups issue their products, as FlashAttention-3 gives them.

Each warpgroup has a hardware barrier that counts its own threads, which wait, and those of the one
before it, which do not. So one warpgroup's softmax runs while the products of another one do.

Between open_turns and close_turns a warpgroup takes and passes turns alternately, and all of them
equally often: no barrier is arrived at twice before its owner has waited, and none is left over.
Whoever has the turn passes it on without waiting for anything else.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Of 16. Triton takes them from 0: the first warpgroup, the change of partitions, each partition.
_LAST_BARRIER = gl.constexpr(15)


@gluon.jit
def _execute(INSTRUCTION: gl.constexpr):
    """Executes an instruction in every thread of a warpgroup."""
    thread = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise(
        INSTRUCTION + " mov.b32 $0, $1;", "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def take_turn(WARPGROUP: gl.constexpr):
    """Waits for the turn of a warpgroup."""
    BARRIER: gl.constexpr = _LAST_BARRIER - WARPGROUP
    INSTRUCTION: gl.constexpr = f"bar.sync {BARRIER}, 256;"
    _execute(INSTRUCTION)


@gluon.jit
def pass_turn(WARPGROUP: gl.constexpr, WARPGROUPS: gl.constexpr):
    """Gives the turn of a warpgroup to the next one."""
    BARRIER: gl.constexpr = _LAST_BARRIER - (WARPGROUP + 1) % WARPGROUPS
    INSTRUCTION: gl.constexpr = f"bar.arrive {BARRIER}, 256;"
    _execute(INSTRUCTION)


@gluon.jit
def open_turns(WARPGROUP: gl.constexpr, WARPGROUPS: gl.constexpr):
    """Gives the first turn to warpgroup 0."""
    if WARPGROUP == WARPGROUPS - 1:
        pass_turn(WARPGROUP, WARPGROUPS)


@gluon.jit
def close_turns(WARPGROUP: gl.constexpr):
    """Takes back the turn that nobody needs any more."""
    if WARPGROUP == 0:
        take_turn(WARPGROUP)
