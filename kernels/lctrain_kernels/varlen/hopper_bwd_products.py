"""Products, weights and partial dq of a step of the Hopper backward of varlen attention."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from lctrain_kernels.gluon.backward_pipeline import store_partial_dq
from lctrain_kernels.gluon.primitives import draw_bits, dropout_head, load_key, rematerialised
from lctrain_kernels.gluon.structures import SeedWords
from lctrain_kernels.varlen.hopper_bwd_dq import add_dq_of_step


@gluon.jit
def start_product(of_keys, of_queries, stage, zero, opaque_false, HALF_INDEX: gl.constexpr):
    """Issues the asynchronous product S = k q^T or dP = v dout^T, [keys, queries], without waiting.

    Args:
        of_keys: Two halves of the tile's keys or values in shared memory, [2, keys, columns].
        of_queries: Queries or dout in shared memory, [stages, queries, columns].
        stage: Pipeline stage of the block of queries.
        zero: Accumulator of zeros, [keys, queries] float32.
        opaque_false: Condition that is always false, but that the compiler cannot evaluate.
        HALF_INDEX: Index of this warpgroup's half of the keys, 0 or 1.
    """
    return warpgroup_mma(
        rematerialised(of_keys, HALF_INDEX, opaque_false),
        of_queries.index(stage).permute((1, 0)),
        zero,
        use_acc=False,
        is_async=True,
    )


@gluon.jit
def seed_words(dropout, HAS_DROPOUT: gl.constexpr):
    """Returns the SeedWords of the program's document. Without dropout, nothing reads its fields.

    Args:
        dropout: Seed, document and threshold of dropout, a DropoutInputs.
        HAS_DROPOUT: Whether attention weights are dropped.
    """
    key_0 = 0
    key_1 = 0
    document_key = 0
    query_offset = 0
    if HAS_DROPOUT:
        key_0, key_1, document_key, query_offset = load_key(
            dropout.seed, dropout.document_ids, dropout.query_offsets, dropout.document
        )
    first_head = 0  # a function cannot return None
    if dropout.first_head is not None:
        first_head = dropout.first_head
    return SeedWords(key_0, key_1, document_key, query_offset, first_head)


@gluon.jit
def draw_block_bits(
    random, head, query, first_key, s_layout: gl.constexpr, HAS_DROPOUT: gl.constexpr
):
    """Draws one random 32-bit word per weight of a block, [keys, queries] uint32.

    Without dropout the result is 0. The caller has started the block's product S, with which the
    drawing overlaps.

    Args:
        random: Inputs of the dropout RNG, a SeedWords.
        head: Index of the query head in the call.
        query: Position in the document of the block's first query.
        first_key: Position in the document of the warpgroup's first key.
        s_layout: Layout of S.
        HAS_DROPOUT: Whether attention weights are dropped.
    """
    bits = 0
    if HAS_DROPOUT:
        bits = draw_bits(
            random.key_0,
            random.key_1,
            random.document,
            dropout_head(head, random.first_head).to(gl.uint32),
            query + random.query_offset,
            gl.arange(0, 64, gl.SliceLayout(0, s_layout))[None, :],
            first_key,
            gl.arange(0, 64, gl.SliceLayout(1, s_layout))[:, None],
        )
    return bits


@gluon.jit
def kept_weights(p, HAS_DROPOUT: gl.constexpr):
    """Returns the weights p that block_weights returned, with dropped, negative ones set to 0."""
    if HAS_DROPOUT:
        p = gl.where(p < 0.0, gl.zeros_like(p), p)
    return p


@gluon.jit
def emit_dq(
    dq,
    dq_out,
    step,
    visit,
    tile,
    TILE: gl.constexpr,
    HALF_INDEX: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    """Hands over a warpgroup's half of partial dq, to be added to dq's float32 buffer.

    Partial dq goes to the dQ warp through shared memory. With TILE.dq_from_registers this warpgroup
    adds it to the buffer itself.

    Args:
        dq: Half of the step's partial dq, float32; see start_dq.
        dq_out: Shared-memory buffers for the dQ warp; DqSlabs with TILE.dq_from_registers.
        step: Index of the step.
        visit: Query head and block of the step, a Visit.
        tile: Tile of keys, a KeyTile.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
        HALF_INDEX: Index of the warpgroup and of its half, 0 or 1.
        TRANSPOSED: Whether dq is [columns, queries], as in start_dq.
    """
    if TILE.dq_from_registers:
        COLUMN: gl.constexpr = HALF_INDEX * (TILE.block_d // 2)
        add_dq_of_step(dq, dq_out, visit, tile, True, 0, COLUMN, TILE)
    else:
        store_partial_dq(dq, dq_out, step, HALF_INDEX, TRANSPOSED)


@gluon.jit
def gradient_of_logits(
    dp,
    weights,
    shared,
    stage,
    dtype: gl.constexpr,
    s_layout: gl.constexpr,
    HAS_DROPOUT: gl.constexpr,
):
    """Returns dS = weights * (dP - delta), the gradient of the logits; dropped weights have dP = 0.

    Args:
        dp: dP of a warpgroup, [keys, queries] float32.
        weights: Weights times the softcap's derivative, [keys, queries]; negative where dropout
            drops them.
        shared: Shared memory of the kernel, a BackwardBuffers, which holds delta.
        stage: Pipeline stage of the block of queries.
        dtype: Dtype of dS, bfloat16 or float16.
        s_layout: Layout of dp.
        HAS_DROPOUT: Whether weights are dropped.
    """
    delta = shared.delta.index(stage).load(gl.SliceLayout(0, s_layout))
    weights = weights.to(gl.float32)
    if HAS_DROPOUT:
        dp = gl.where(weights > 0.0, dp, 0.0)
        weights = gl.abs(weights)
    return (weights * (dp - delta[None, :])).to(dtype)
