"""Signals between the warps of a program, by the hardware's 16 named barriers.

An mbarrier operation of Gluon first brings all four warps of a warpgroup together. These do not:
each thread signals when it gets there, and only those who wait are held up. What the copy engine
completes has to be an mbarrier.

A barrier counts threads that signal and threads that wait, and begins anew when all have come. So
every signal needs its wait: where a loop signals more often than it waits, the rest is settled
after it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Triton itself takes 0 to 2 for two warpgroups and single warps beside them, 3 with a third.
DS_FULL = gl.constexpr(3)  # both halves of dS are in shared memory
DQ_EMPTY = gl.constexpr(4)  # and 5: the adder has read a half of dq
DQ_READY = gl.constexpr(6)  # and 7: a half of dq is there for the adder
DO_EMPTY = gl.constexpr(8)  # to 11: both warpgroups have read a block of dout
Q_EMPTY = gl.constexpr(12)  # to 15: the same of queries
DS_READ = gl.constexpr(11)  # and 15, if there are three stages: a warpgroup has read dS
BLOCK_EMPTY = DO_EMPTY  # both warpgroups have read a block of queries and of dout
# 12 to 15: a warpgroup's half of dS is in shared memory, in even and odd steps, since it may be a
# step ahead of the other.
DS_READY = Q_EMPTY
V_EMPTY = DO_EMPTY  # of a forward: all warpgroups have read a block of values
K_EMPTY = Q_EMPTY  # the same of keys
MOST_STAGES = 4  # of what a loader brings
# Threads that a barrier counts: of two warpgroups, and of the single warps beside them.
BOTH = gl.constexpr(256)
LOADER_AND_BOTH = gl.constexpr(32 + 256)
ADDER_AND_ONE = gl.constexpr(32 + 128)


@gluon.jit
def _execute(INSTRUCTION: gl.constexpr, barrier, threads, wanted, WARPS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    ASSEMBLY: gl.constexpr = (
        "{ .reg .pred go; setp.ne.s32 go, $3, 0; @go " + INSTRUCTION + " $1, $2; mov.b32 $0, $1; }"
    )
    gl.inline_asm_elementwise(
        ASSEMBLY,
        "=r,r,r,r",
        [
            gl.full([32 * WARPS], barrier, gl.int32, layout),
            gl.full([32 * WARPS], threads, gl.int32, layout),
            gl.full([32 * WARPS], wanted, gl.int32, layout),
        ],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def signal(barrier, threads, WARPS: gl.constexpr):
    """Counts this partition's threads, and goes on.

    Args:
        barrier: Which, 3 to 15.
        threads: How many the barrier waits for, of all that signal or wait.
        WARPS: Of this partition.
    """
    _execute("bar.arrive", barrier, threads, 1, WARPS)


@gluon.jit
def await_signal(barrier, threads, WARPS: gl.constexpr, wanted=1):
    """Counts this partition's threads, and waits until all have come; nothing unless `wanted`."""
    _execute("bar.sync", barrier, threads, wanted, WARPS)


@gluon.jit
def await_place(EMPTY: gl.constexpr, turn, STAGES: gl.constexpr, THREADS: gl.constexpr):
    """Lets a loader wait until the place of its turn-th block is empty.

    Args:
        EMPTY: K_EMPTY, V_EMPTY, Q_EMPTY or DO_EMPTY.
        turn: From 0.
        STAGES: Places, at most MOST_STAGES.
        THREADS: Of the loader and of all warpgroups that read.
    """
    await_signal(EMPTY + turn % STAGES, THREADS, 1, gl.where(turn >= STAGES, 1, 0))


@gluon.jit
def give_place(EMPTY: gl.constexpr, place, THREADS: gl.constexpr):
    """Tells the loader that this warpgroup has read a place."""
    signal(EMPTY + place, THREADS, 4)


@gluon.jit
def settle_places(EMPTY: gl.constexpr, turns, STAGES: gl.constexpr, THREADS: gl.constexpr):
    """Lets the loader take in the last signals, for which it has no use any more."""
    for place in gl.static_range(STAGES):
        await_signal(EMPTY + place, THREADS, 1, gl.where(turns > place, 1, 0))


@gluon.jit
def next_place(place, phase, STAGES: gl.constexpr):
    """The place of the next block, and the phase of its barrier."""
    last = place == STAGES - 1
    return gl.where(last, 0, place + 1), gl.where(last, phase ^ 1, phase)
