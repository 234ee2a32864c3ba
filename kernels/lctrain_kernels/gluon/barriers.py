"""Numbers and operations of the hardware's 16 named barriers, at which warps of a program wait.

In Gluon, an mbarrier operation first synchronises all four warps of a warpgroup. A named barrier
avoids that: each thread arrives by itself, and only waiting threads stop. TMA copies can only
signal an mbarrier.

A named barrier counts the threads that arrive and those that wait, and resets when all have come.
So every arrival needs a matching wait. If a loop arrives more often than it waits, `drain_stages`
waits the remaining times.
"""

from enum import IntEnum
from itertools import combinations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MOST_STAGES = 4  # pipeline stages of a producer


class Barrier(IntEnum):
    """Hardware numbers of the named barriers of the Hopper kernels; the first one for each name.

    A barrier of a pipeline has one number per stage; `_COUNTS` gives how many numbers the other
    barriers have. Numbers of different kernels overlap. Triton reserves the numbers 0 to 2, and
    with three warpgroups also 3.
    """

    DS_LATER_0 = 3  # the first consumer's dS is in shared memory; four steps differ
    DS_APART_0 = 3  # the first consumer's dS is in shared memory; three steps differ
    DS_FULL = 3  # dS, or both halves of it, is in shared memory
    P_READY = 4  # weights are in shared memory
    DQ_EMPTY = 4  # the dQ warp has read a half of partial dq
    DQ_READY = 6  # a half of partial dq is in shared memory
    V_EMPTY = 8  # all consumers have read a stage of values
    DOUT_EMPTY = 8  # both consumers have read a stage of dout
    BLOCK_EMPTY = 8  # both consumers have read a stage of queries and of dout
    DS_READ_0 = 11  # the first consumer has read dS
    K_EMPTY = 12  # all consumers have read a stage of keys
    Q_EMPTY = 12  # both consumers have read a stage of queries
    DS_APART_1 = 12  # the second consumer's dS is in shared memory; three steps differ
    DS_LATER_1 = 12  # the second consumer's dS is in shared memory; four steps differ
    DS_READY = 12  # a consumer's half of dS is in shared memory; even and odd steps differ
    DS_READ_1 = 15  # the second consumer has read dS


_COUNTS = {  # of those that have no number per stage
    **dict.fromkeys(("DQ_EMPTY", "DQ_READY"), 2),
    **dict.fromkeys(("DS_READY", "DS_LATER_0", "DS_LATER_1"), 4),
    **dict.fromkeys(("DS_APART_0", "DS_APART_1"), 3),
}
_STAGED = ("V_EMPTY", "K_EMPTY", "Q_EMPTY", "DOUT_EMPTY", "BLOCK_EMPTY")
_USED = {
    "forward": ("V_EMPTY", "K_EMPTY"),
    "varlen_bwd": ("DQ_EMPTY", "DQ_READY", "BLOCK_EMPTY", "DS_READY"),
    "varlen_bwd_later": ("BLOCK_EMPTY", "DS_LATER_0", "DS_LATER_1"),
    "varlen_bwd_persistent": ("BLOCK_EMPTY", "DS_APART_0", "DS_APART_1"),
    "varlen_bwd_wide": ("DS_FULL", "P_READY", "BLOCK_EMPTY"),
    "dual_chunk_bwd": ("DS_FULL", "DQ_EMPTY", "DQ_READY", "DOUT_EMPTY", "Q_EMPTY"),
    "differential_bwd": (
        "DS_FULL",
        "DQ_EMPTY",
        "DQ_READY",
        "DOUT_EMPTY",
        "Q_EMPTY",
        "DS_READ_0",
        "DS_READ_1",
    ),
}


def barrier_numbers(kernel: str, stages: int) -> dict[str, range]:
    """Returns the hardware numbers of each named barrier of a kernel.

    Args:
        kernel: Key of _USED, such as "forward".
        stages: Number of pipeline stages.
    """
    counts = _COUNTS | dict.fromkeys(_STAGED, stages)
    return {
        name: range(Barrier[name], Barrier[name] + counts.get(name, 1)) for name in _USED[kernel]
    }


def barriers_fit(kernel: str, stages: int) -> bool:
    """Returns whether the hardware's 16 named barriers suffice for a kernel with these stages.

    Args:
        kernel: Key of _USED, such as "forward".
        stages: Number of pipeline stages.
    """
    numbers = barrier_numbers(kernel, stages)
    overlap = any(set(one) & set(other) for one, other in combinations(numbers.values(), 2))
    return stages <= MOST_STAGES and max(map(max, numbers.values())) < 16 and not overlap


def most_stages(kernel: str) -> int:
    """Returns the most pipeline stages that a kernel's named barriers allow."""
    return max(stages for stages in range(1, MOST_STAGES + 1) if barriers_fit(kernel, stages))


# Kernels assert these at compile time.
FORWARD_STAGES = gl.constexpr(most_stages("forward"))
VARLEN_BWD_STAGES = gl.constexpr(most_stages("varlen_bwd"))
VARLEN_BWD_LATER_STAGES = gl.constexpr(most_stages("varlen_bwd_later"))
VARLEN_BWD_PERSISTENT_STAGES = gl.constexpr(most_stages("varlen_bwd_persistent"))
VARLEN_BWD_WIDE_STAGES = gl.constexpr(most_stages("varlen_bwd_wide"))
DUAL_CHUNK_BWD_STAGES = gl.constexpr(most_stages("dual_chunk_bwd"))
DIFFERENTIAL_BWD_STAGES = gl.constexpr(most_stages("differential_bwd"))
DS_LATER_0 = gl.constexpr(Barrier.DS_LATER_0.value)
DS_LATER_1 = gl.constexpr(Barrier.DS_LATER_1.value)
DS_APART_0 = gl.constexpr(Barrier.DS_APART_0.value)
DS_APART_1 = gl.constexpr(Barrier.DS_APART_1.value)
DS_FULL = gl.constexpr(Barrier.DS_FULL.value)
DQ_EMPTY = gl.constexpr(Barrier.DQ_EMPTY.value)
DQ_READY = gl.constexpr(Barrier.DQ_READY.value)
V_EMPTY = gl.constexpr(Barrier.V_EMPTY.value)
DOUT_EMPTY = gl.constexpr(Barrier.DOUT_EMPTY.value)
BLOCK_EMPTY = gl.constexpr(Barrier.BLOCK_EMPTY.value)
DS_READ_0 = gl.constexpr(Barrier.DS_READ_0.value)
K_EMPTY = gl.constexpr(Barrier.K_EMPTY.value)
Q_EMPTY = gl.constexpr(Barrier.Q_EMPTY.value)
DS_READY = gl.constexpr(Barrier.DS_READY.value)
P_READY = gl.constexpr(Barrier.P_READY.value)
DS_READ_1 = gl.constexpr(Barrier.DS_READ_1.value)
# Number of threads that a barrier counts: two consumer warpgroups, with or without single warps.
CONSUMERS = gl.constexpr(256)
PRODUCER_AND_CONSUMERS = gl.constexpr(32 + 256)
DQ_WARP_AND_CONSUMER = gl.constexpr(32 + 128)


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
def barrier_arrive(barrier, threads, WARPS: gl.constexpr):
    """Arrives at a named barrier with all threads of this partition, without waiting.

    Args:
        barrier: Hardware number of the barrier, 3 to 15.
        threads: Number of arriving and waiting threads after which the barrier completes.
        WARPS: Number of warps of this partition.
    """
    _execute("bar.arrive", barrier, threads, 1, WARPS)


@gluon.jit
def barrier_wait(barrier, threads, WARPS: gl.constexpr, wanted=1):
    """Arrives at a named barrier with all threads of this partition, and waits until it completes.

    Args:
        barrier: Hardware number of the barrier, 3 to 15.
        threads: Number of arriving and waiting threads after which the barrier completes.
        WARPS: Number of warps of this partition.
        wanted: 0 to skip the barrier, a run-time condition.
    """
    _execute("bar.sync", barrier, threads, wanted, WARPS)


@gluon.jit
def acquire_stage(EMPTY: gl.constexpr, block, STAGES: gl.constexpr, THREADS: gl.constexpr):
    """Makes a producer warp wait until the pipeline stage of a block is empty.

    Blocks fill the stages in turn, so the first STAGES blocks do not wait.

    Args:
        EMPTY: First number of the barrier of empty stages, such as K_EMPTY or Q_EMPTY.
        block: Number of blocks that the producer has loaded before.
        STAGES: Pipeline stages, at most MOST_STAGES.
        THREADS: Number of threads of the producer and all consumers.
    """
    barrier_wait(EMPTY + block % STAGES, THREADS, 1, gl.where(block >= STAGES, 1, 0))


@gluon.jit
def release_stage(EMPTY: gl.constexpr, stage, THREADS: gl.constexpr):
    """Signals the producer warp that this consumer warpgroup has read a pipeline stage.

    Args:
        EMPTY: First number of the barrier of empty stages, such as K_EMPTY or Q_EMPTY.
        stage: Index of the stage.
        THREADS: Number of threads of the producer and all consumers.
    """
    barrier_arrive(EMPTY + stage, THREADS, 4)


@gluon.jit
def drain_stages(EMPTY: gl.constexpr, blocks, STAGES: gl.constexpr, THREADS: gl.constexpr):
    """Makes the producer warp wait, after its loop, until consumers have read its last stages.

    Args:
        EMPTY: First number of the barrier of empty stages, such as K_EMPTY or Q_EMPTY.
        blocks: Number of blocks that the producer has loaded.
        STAGES: Pipeline stages, at most MOST_STAGES.
        THREADS: Number of threads of the producer and all consumers.
    """
    for stage in gl.static_range(STAGES):
        barrier_wait(EMPTY + stage, THREADS, 1, gl.where(blocks > stage, 1, 0))


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """Returns the pipeline stage of the next block, and the phase (0 or 1) of its mbarrier.

    Args:
        stage: Stage of this block.
        phase: Phase of this block's mbarrier, which flips when the stages wrap around.
        STAGES: Number of pipeline stages.
    """
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)
