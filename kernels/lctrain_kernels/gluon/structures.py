"""Named tuples that the functions of a Hopper kernel pass to each other.

A kernel's docstring describes its own arguments. The attention kernels share these:

- *_desc: TMA descriptor of a tensor.
- pointers, strides: Named tuples of the other tensors' addresses, and of strides in elements.
- num_items: Number of work items: tiles times head groups.
- total_q, scale, softcap, threshold, keep_scale, first_head: See Scalars.
- window_left, window_right: Numbers of keys that a query sees before and after its own position;
  negative is unbounded. If pointers.window is given, the kernel reads both numbers there.
- TILE: Sizes and head counts, a ForwardShape or BackwardShape.
- FLAGS: Features beyond plain attention, a tile.structures.Flags.

Triton 3.6 restricts them. A named tuple holds either constants or run-time values; both may include
None. Integers that must not specialise a kernel are separate launch arguments. No field is named
`values` or `type`, and a named tuple has no properties.
"""

from typing import Any, NamedTuple


class ForwardShape(NamedTuple):
    """Constants of a persistent forward kernel.

    Attributes:
        group: Number of query heads per key/value head.
        heads: Number of query heads.
        pack: Number of query heads of one key/value head that share a tile.
        consumers: Number of consumer warpgroups, of 64 rows each.
        block_n: Number of keys of a block.
        block_d: Columns of a tile of queries and keys.
        q_stages: Number of pipeline stages of queries.
        stages: Number of pipeline stages of keys, and of values.
        sync_before_products: Whether the warps of a warpgroup synchronise before the products of a
            block instead of after them.
        block_dv: Columns of a tile of values, where they may differ from block_d.
        num_k: Number of key tensors, 2 for differential attention with one k per branch.
    """

    group: int
    heads: int
    pack: int
    consumers: int
    block_n: int
    block_d: int
    q_stages: int
    stages: int
    sync_before_products: bool = False
    block_dv: int = 0
    num_k: int = 1


class BackwardShape(NamedTuple):
    """Constants of a backward kernel.

    Attributes:
        group: Number of query heads per key/value head.
        heads_kv: Number of key/value heads.
        head_dim: Head dim D; columns beyond it are padding.
        block_m: Number of queries of a block.
        block_n: Number of keys of a tile.
        block_d: Columns of a tile of queries and keys.
        stages: Number of pipeline stages of queries.
        dq_from_registers: Whether the consumer warpgroups add partial dq to global memory.
        slab_rows: Queries of a slab of the float32 buffer to which they add it, 16 or 1.
        deterministic: Whether partial dq must be added in the order of the keys.
        value_dim: Head dim Dv of the values in differential attention.
        block_dv: Columns of a tile of values, of differential attention.
        num_k: Number of key tensors, 2 for differential attention with one k per branch.
    """

    group: int
    heads_kv: int
    head_dim: int
    block_m: int
    block_n: int
    block_d: int
    stages: int
    dq_from_registers: bool = False
    deterministic: bool = False
    value_dim: int = 0
    block_dv: int = 0
    num_k: int = 1
    slab_rows: int = 16


class Pipeline(NamedTuple):
    """The mbarriers of a pipeline, one of each per stage.

    Attributes:
        ready: Completed when the producer has filled a stage.
        empty: Completed when all consumers have read a stage.
    """

    ready: Any
    empty: Any


class ForwardBuffers(NamedTuple):
    """Shared memory of a persistent forward kernel.

    Attributes:
        q: Queries, [q_stages * consumers, rows, block_d].
        k: Keys, [stages * num_k, block_n, block_d].
        v: Values, [stages, block_n, block_dv].
        tiles: Tiles that the scheduler warp has written, as int32 fields.
        tile_bars: mbarriers of the pipeline of tiles.
        q_bars: mbarriers of the pipeline of queries.
        k_ready: mbarriers of filled stages of keys; named barriers signal empty stages.
        v_ready: mbarriers of filled stages of values; named barriers signal empty stages.
    """

    q: Any
    k: Any
    v: Any
    tiles: Any
    tile_bars: Any
    q_bars: Any
    k_ready: Any
    v_ready: Any


class BackwardBuffers(NamedTuple):
    """Shared memory of a backward kernel.

    Attributes:
        k: Two halves of the tile's keys, [2 * num_k, 64, block_d].
        v: Two halves of the tile's values, [2, 64, block_dv].
        q: Queries, one or two buffers per stage.
        dout: Gradients of out, [stages, block_m, block_dv].
        lse: Base-2 log-sum-exp of the queries.
        delta: Term that dS subtracts per query: rowsum(dout * out) minus the gradient of lse.
        kv_ready: mbarrier of the tile's keys and values.
        q_ready: mbarriers of queries.
        dout_ready: mbarriers of dout.
    """

    k: Any
    v: Any
    q: Any
    dout: Any
    lse: Any
    delta: Any
    kv_ready: Any
    q_ready: Any
    dout_ready: Any


class WorkTile(NamedTuple):
    """A tile of queries from the tile scheduler, and the blocks of keys that the tile sees.

    Attributes:
        end_q: Index in the pack after the document's last query.
        length_q: Number of queries of the document.
        end_k: Index in the pack after the document's last key.
        length_k: Number of keys of the document.
        first: Position in the document of the tile's first query.
        head: Index of the tile's first query head.
        low: Index of the first block of keys that the tile sees.
        high: Index after the last block of keys that the tile sees.
    """

    end_q: Any
    length_q: Any
    end_k: Any
    length_k: Any
    first: Any
    head: Any
    low: Any
    high: Any


class KeyTile(NamedTuple):
    """A tile of keys of a backward kernel's program, and the blocks of queries that see the tile.

    Attributes:
        head_kv: Index of the key/value head.
        begin_q: Index in the pack of the document's first query.
        length_q: Number of queries of the document.
        begin_k: Index in the pack of the document's first key.
        length_k: Number of keys of the document.
        first: Position in the document of the tile's first key.
        low: Index of the first block of queries that sees the tile.
        high: Index after the last block of queries that sees the tile.
    """

    head_kv: Any
    begin_q: Any
    length_q: Any
    begin_k: Any
    length_k: Any
    first: Any
    low: Any
    high: Any


class KeySlot(NamedTuple):
    """A backward program's tile of keys, and the tile's document, as the tile schedule lists them.

    Attributes:
        head_kv: Index of the key/value head.
        document: Index of the document in the pack; -1 for an empty slot of the schedule.
        first: Position in the document of the tile's first key.
        begin_q: Index in the pack of the document's first query.
        length_q: Number of queries of the document.
        begin_k: Index in the pack of the document's first key.
        length_k: Number of keys of the document.
    """

    head_kv: Any
    document: Any
    first: Any
    begin_q: Any
    length_q: Any
    begin_k: Any
    length_k: Any


class Visit(NamedTuple):
    """The queries that a step of the varlen backward works on; next_visit gives the order.

    Attributes:
        member: Index of the query head in the group of its key/value head.
        block: Index of the block of queries in the document.
    """

    member: Any
    block: Any


class SeedWords(NamedTuple):
    """Inputs of the dropout RNG that a document's weights share, in the backward; see draw_bits.

    Attributes:
        key_0: Low half of the seed, uint32.
        key_1: High half of the seed, uint32.
        document: Document id, uint32.
        query_offset: Position within the document of the first query that this rank holds.
        first_head: Index of the call's first query head for the dropout RNG; None instead of 0.
    """

    key_0: Any
    key_1: Any
    document: Any
    query_offset: Any
    first_head: Any


class DropoutKey(NamedTuple):
    """Inputs of the dropout RNG for a tile of queries, in the forward; see draw_bits.

    Attributes:
        key_0: Low half of the seed, uint32.
        key_1: High half of the seed, uint32.
        document: Document id, uint32.
        head: Index, for the dropout RNG, of the query head of each row; see dropout_head.
        first: Position within the document of the tile's first query, which keys its dropout mask.
        local_query: Position of each row's query, relative to `first`.
    """

    key_0: Any
    key_1: Any
    document: Any
    head: Any
    first: Any
    local_query: Any


class Scalars(NamedTuple):
    """Scalar arguments of a call that a consumer warpgroup of a forward reads.

    Attributes:
        total_q: Number of packed queries T.
        scale: softmax_scale, the factor of q.k.
        softcap: Softcap c, which replaces a logit x by c tanh(x / c); None without one.
        threshold: A weight is dropped if its 16 random bits are below this number.
        keep_scale: 1 / keep probability, the factor of kept weights.
        first_head: Index of the call's first query head for the dropout RNG; None instead of 0.
    """

    total_q: Any
    scale: Any
    softcap: Any
    threshold: Any
    keep_scale: Any
    first_head: Any


class ConsumerPointers(NamedTuple):
    """Tensors that a consumer warpgroup of a forward accesses without TMA.

    Attributes:
        lse: Log-sum-exp of each query, [H, T] float32; written.
        factor: Learnable sinks [H] (varlen), factors of the logits [N] (dual chunk), or None.
        dropout_seed: Seed of the dropout mask, [1] int64; None without dropout.
        document_ids: Ids of the documents, [N] int32, an input of the dropout RNG; or None.
        query_offsets: Position within its document of the first query that this rank holds, [N]
            int32, for the dropout mask; None takes 0: the rank holds whole documents.
    """

    lse: Any
    factor: Any
    dropout_seed: Any
    document_ids: Any
    query_offsets: Any


class Statistics(NamedTuple):
    """Float32 numbers per query and head that the producer warp of a backward loads.

    Attributes:
        lse: Base-2 log-sum-exp, [H, T]. Dual chunk attention passes stats [H, T, 4] here, whose
            first two numbers are lse and delta. Differential attention passes stats [4, H, T]: the
            lse of both branches, then the deltas of both.
        delta: rowsum(dout * out) - dlse, [H, T]; None if it is part of `lse`.
        total_q: Number of packed queries T.
    """

    lse: Any
    delta: Any
    total_q: Any


class Semaphores(NamedTuple):
    """Counters, in global memory, of the partial dq added so far to each block of dq of each head.

    A later program waits until a counter shows that the earlier ones have added theirs.

    Attributes:
        pointer: Counters [H, per_head] int32, zero at launch.
        per_head: Number of counters per head.
        document: Index of the document in the pack.
    """

    pointer: Any
    per_head: Any
    document: Any


class KeyGradients(NamedTuple):
    """dk and dv, which share one layout, and their strides.

    Attributes:
        dk: Gradient of k, [Tk, Hk, D].
        dv: Gradient of v, [Tk, Hk, D].
        token: Stride of tokens, in elements.
        head: Stride of heads, in elements.
    """

    dk: Any
    dv: Any
    token: Any
    head: Any


class DropoutInputs(NamedTuple):
    """Launch arguments of dropout, and the document whose weights are dropped.

    Attributes:
        seed: Seed of the dropout mask, [1] int64; None without dropout.
        document_ids: Ids of the documents, [N] int32, an input of the dropout RNG; or None.
        query_offsets: Position within its document of the first query that this rank holds, [N]
            int32, for the dropout mask; None takes 0: the rank holds whole documents.
        document: Index of the document in the pack.
        threshold: A weight is dropped if its 16 random bits are below this number.
        first_head: Index of the call's first query head for the dropout RNG; None instead of 0.
    """

    seed: Any
    document_ids: Any
    query_offsets: Any
    document: Any
    threshold: Any
    first_head: Any


class Factors(NamedTuple):
    """Factors of a call that the backward applies to logits and gradients.

    Attributes:
        scale: softmax_scale, the factor of q.k.
        softcap: Softcap c, which replaces a logit x by c tanh(x / c).
        keep_scale: 1 / keep probability, the factor of kept weights.
    """

    scale: Any
    softcap: Any
    keep_scale: Any


class DqSlabs(NamedTuple):
    """The float32 buffer to which consumer warpgroups add partial dq from their registers.

    A slab holds dq of 16 queries, or of one. `first_slab` in varlen/hopper_bwd_dq.py describes the
    layout.

    Attributes:
        pointer: Pointer to the slab of the first head and of the first block of queries that the
            program visits.
        per_head: Number of slabs per head.
    """

    pointer: Any
    per_head: Any


class SchedulerInputs(NamedTuple):
    """Inputs of the tile scheduler.

    Attributes:
        cu_seqlens_q: Cumulative query lengths, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        tiles: Tiles of a TileSchedule, [n, 2] int32.
        counter: Atomic int32 counter, zero at launch, from which programs take their next tile.
        num_items: Number of work items: tiles times head groups.
    """

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    counter: Any
    num_items: Any
