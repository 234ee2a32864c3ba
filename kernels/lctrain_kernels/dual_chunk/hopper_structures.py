"""Named groups of the Hopper kernels of dual chunk attention."""

from typing import Any, NamedTuple


class BlockRanges(NamedTuple):
    """Blocks of keys of a tile of queries: first INTER, then SUCC, then INTRA.

    Attributes:
        near_block: First SUCC block.
        own_block: First INTRA block.
        blocks: Number of all blocks.
        near_shift: First key of a SUCC block, less block * BLOCK_N.
        own_shift: The same of an INTRA block.
        far_clear: First key of the INTER blocks that need a mask.
        near_clear: The same of SUCC.
        own_clear: The same of INTRA.
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
    """Tensors of dual_chunk_fwd_hopper_kernel; lse [H, T] float32, logit_scale [N] float32."""

    lse: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    counter: Any
    logit_scale: Any
    dropout_seed: Any
    document_ids: Any


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
    """Distances between tokens and between heads of dk, dv and their sums, in elements."""

    token: Any
    head: Any


class ResultPointers(NamedTuple):
    """Gradients of keys and values, and the float32 sums that one launch passes to the next."""

    dk: Any
    dv: Any
    dk_sum: Any
    dv_sum: Any


class QueryRun(NamedTuple):
    """First block of the queries that see a tile of keys, for one range.

    Attributes:
        low: First query.
        jump: First block behind the gap.
        gap: Queries that are left out before block `jump`.
    """

    low: Any
    first_after_gap: Any
    gap: Any


class ChunkTile(NamedTuple):
    """A tile of keys with the blocks of queries that see it in one range.

    Attributes:
        head_kv: Index of the key/value head.
        begin_q: First query of the document in the pack.
        length_q: Queries of the document.
        begin_k: First key of the document in the pack.
        end: End of the keys of this range, in the document.
        length_k: Keys of the document.
        first: First key of the tile in the document.
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
    """Inputs of a consumer warpgroup.

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
