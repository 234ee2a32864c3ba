"""Named tuples that the Hopper kernels of dual chunk attention take or pass to their functions."""

from typing import Any, NamedTuple


class BlockRanges(NamedTuple):
    """Blocks of keys that a tile of queries sees: first INTER, then SUCC, then INTRA.

    Attributes:
        succ_block: Index of the first SUCC block.
        intra_block: Index of the first INTRA block.
        blocks: Number of blocks of all three ranges.
        succ_shift: First key of SUCC block i, less i * BLOCK_N.
        intra_shift: First key of INTRA block i, less i * BLOCK_N.
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

    lse is [H, T] float32, logit_scale [N] float32.
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
    """Tensors of dual_chunk_bwd_hopper_kernel, whose docstring gives their shapes."""

    stats: Any
    dk: Any
    dv: Any
    dk_sum: Any
    dv_sum: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    logit_scale: Any


class BackwardStrides(NamedTuple):
    """Strides of tokens and heads of dk, dv and their float32 sums, in elements."""

    token: Any
    head: Any


class ResultPointers(NamedTuple):
    """Gradients of keys and values, and the float32 sums that one launch passes to the next."""

    dk: Any
    dv: Any
    dk_sum: Any
    dv_sum: Any


class QueryRun(NamedTuple):
    """Positions of the query blocks that see a tile of keys in one range.

    Blocks are consecutive from query `low` on, except for one gap.

    Attributes:
        low: Position of the first query.
        first_after_gap: Index of the first block after the gap.
        gap: Number of queries that are skipped before that block.
    """

    low: Any
    first_after_gap: Any
    gap: Any


class ChunkTile(NamedTuple):
    """A tile of keys with the query blocks that see it in one range.

    Attributes:
        head_kv: Index of the key/value head.
        begin_q: Index in the pack of the document's first query.
        length_q: Number of queries of the document.
        begin_k: Index in the pack of the document's first key.
        end: Position in the document after the last key of this range.
        length_k: Number of keys of the document.
        first: Position in the document of the tile's first key.
        run: Start of the blocks of queries, and the gap between two runs of them.
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


class BackwardInputs(NamedTuple):
    """Inputs of a consumer warpgroup of the backward.

    Attributes:
        shared: Shared memory of the kernel.
        dq: Two float32 shared-memory buffers of partial dq, one per consumer warpgroup.
        ds: dS of both warpgroups, [4, 64, block_m].
        results: Pointers to which the gradients of keys and values are stored.
        strides: Strides of the stored gradients.
        tile: Tile of keys that the program works on.
    """

    shared: Any
    dq: Any
    ds: Any
    results: Any
    strides: Any
    tile: Any
