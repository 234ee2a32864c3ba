"""Named tuples that the Hopper kernels of dual chunk attention take or pass to their functions."""

from typing import Any, NamedTuple


class BlockRanges(NamedTuple):
    """Blocks of keys that a tile of queries sees: first INTER, then SUCC, then INTRA.

    ranges.py defines these ranges. The blocks are numbered from 0 through all three ranges. The
    first key of block i is i * BLOCK_N plus the shift of its range; INTER has no shift.

    Attributes:
        succ_block: Number of the first SUCC block.
        intra_block: Number of the first INTRA block.
        blocks: Number of blocks of all three ranges.
        succ_shift: Shift of SUCC blocks, in keys.
        intra_shift: Shift of INTRA blocks, in keys.
        inter_clear: Key position from which INTER blocks need a mask.
        succ_clear: Key position from which SUCC blocks need a mask.
        intra_clear: Key position from which INTRA blocks need a mask.
    """

    succ_block: Any
    intra_block: Any
    blocks: Any
    succ_shift: Any
    intra_shift: Any
    inter_clear: Any
    succ_clear: Any
    intra_clear: Any


class ForwardPointers(NamedTuple):
    """Tensors that dual_chunk_fwd_hopper_kernel accesses without TMA.

    Attributes:
        lse: Log-sum-exp, [H, T] float32; written.
        cu_seqlens_q: Cumulative query lengths, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        tiles: Tiles of queries of a TileSchedule, [n, 2] int32.
        counter: Atomic int32 counter, zero at launch, from which programs take their next tile.
        logit_scale: Factor of the logits of each document, [N] float32, or None.
        dropout_seed: Seed of the dropout mask, [1] int64; None without dropout.
        document_ids: Ids of the documents, [N] int32, an input of the dropout RNG; or None.
        query_offsets: Position within its document of the first query that this rank holds, [N]
            int32, for the dropout mask; None takes 0: the rank holds whole documents.
    """

    lse: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    counter: Any
    logit_scale: Any
    dropout_seed: Any
    document_ids: Any
    query_offsets: Any


class BackwardPointers(NamedTuple):
    """Tensors that dual_chunk_bwd_hopper_kernel accesses without TMA.

    Attributes:
        stats: Statistics per query from dual_chunk_rotate, [H, T, 4] float32.
        dk: Gradient of k, [Tk, Hk, D]; None in the SUCC launch.
        dv: Gradient of v, [Tk, Hk, D]; None in the SUCC launch.
        dk_sum: dk of the launches so far, [Tk, Hk, D] float32, unscaled.
        dv_sum: dv of the launches so far, [Tk, Hk, D] float32.
        dq_sum: Slabs of the sum of partial dq, float32; None if the dQ warp adds it.
        cu_seqlens_q: Cumulative query lengths, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        tiles: Tiles of keys of a TileSchedule, [n, 2] int32.
        logit_scale: Factor of the logits of each document, [N] float32, or None.
    """

    stats: Any
    dk: Any
    dv: Any
    dk_sum: Any
    dv_sum: Any
    dq_sum: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    logit_scale: Any


class BackwardStrides(NamedTuple):
    """Strides of tokens and heads of dk, dv and their float32 sums, in elements."""

    token: Any
    head: Any


class ResultPointers(NamedTuple):
    """Gradients of keys and values, and the float32 sums that one launch passes to the next.

    The shapes are those of BackwardPointers.
    """

    dk: Any
    dv: Any
    dk_sum: Any
    dv_sum: Any


class QueryRun(NamedTuple):
    """Positions of the query blocks that see a tile of keys in one range.

    Blocks are consecutive from query `low` on, except for one gap. SUCC has a gap if the tile's
    keys are in two chunks, because each chunk's keys are seen by the start of the next chunk.

    Attributes:
        low: Position of the first query.
        first_after_gap: Index of the first block after the gap.
        gap: Number of queries that are skipped before that block.
    """

    low: Any
    first_after_gap: Any
    gap: Any


class ChunkTile(NamedTuple):
    """A tile of keys of a backward program, and the query blocks that see it in one range.

    Attributes:
        head_kv: Index of the key/value head.
        begin_q: Index in the pack of the document's first query.
        length_q: Number of queries of the document.
        begin_k: Index in the pack of the document's first key.
        end: Position in the document after the last key of this range.
        length_k: Number of keys of the document.
        first: Position in the document of the tile's first key.
        run: Positions of the blocks of queries, a QueryRun.
        blocks: Number of blocks of queries.
    """

    head_kv: Any
    begin_q: Any
    length_q: Any
    begin_k: Any
    end: Any
    length_k: Any
    first: Any
    run: Any
    blocks: Any


class ChunkBounds(NamedTuple):
    """What masks the weights of a consumer warpgroup of the backward.

    Attributes:
        first_key: Position in the document of the warpgroup's first key.
        clear_first: First block of queries that sees all keys of the warpgroup.
        clear_end: Index after the last such block.
        chunk_length: Number of tokens of a chunk.
        succ_length: Number of SUCC queries at the start of a chunk.
    """

    first_key: Any
    clear_first: Any
    clear_end: Any
    chunk_length: Any
    succ_length: Any


class BackwardInputs(NamedTuple):
    """Inputs of a consumer warpgroup of the backward.

    Attributes:
        shared: Shared memory of the kernel, a gluon.structures.BackwardBuffers.
        dq: Two float32 shared-memory buffers of partial dq, one per consumer warpgroup; DqSlabs of
            the document if the consumers add partial dq.
        ds: dS of two steps and both warpgroups, [4, 64, block_m]; of four steps with DqSlabs.
        results: Pointers to which the gradients of keys and values are stored, a ResultPointers.
        strides: Strides of the stored gradients.
        tile: Tile of keys that the program works on, a ChunkTile.
        chunk_length: Number of tokens of a chunk.
        succ_length: Number of SUCC queries at the start of a chunk.
    """

    shared: Any
    dq: Any
    ds: Any
    results: Any
    strides: Any
    tile: Any
    chunk_length: Any
    succ_length: Any
