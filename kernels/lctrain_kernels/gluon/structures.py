"""Named groups that the parts of a Hopper kernel pass to each other.

Triton 3.6 sets the rules. A group holds constants or run-time values, not both; None may be among
either. Integers that must not specialise a kernel stay launch arguments of their own. A field is
never called `values` or `type`, and a group has no properties.
"""

from typing import Any, NamedTuple


class ForwardShape(NamedTuple):
    """Constants of a persistent forward kernel.

    Attributes:
        group: Number of query heads per key/value head.
        heads: Number of query heads.
        pack: Query heads of one key/value head that share a tile.
        consumers: Consumer warpgroups of 64 rows each.
        block_n: Keys of a block.
        block_d: Columns of a tile of queries and keys.
        q_stages: Pipeline stages of queries.
        stages: Pipeline stages of keys, and of values.
        meet_early: True if the warps of a warpgroup synchronise before the products of a
            block.
        block_dv: Columns of a tile of values, where they may differ from block_d.
        num_k: Tensors of keys: 2 for differential attention with one k per branch.
    """

    group: int
    heads: int
    pack: int
    consumers: int
    block_n: int
    block_d: int
    q_stages: int
    stages: int
    meet_early: bool = False
    block_dv: int = 0
    num_k: int = 1


class BackwardShape(NamedTuple):
    """Constants of a backward kernel.

    Attributes:
        group: Number of query heads per key/value head.
        heads_kv: Number of key/value heads.
        head_dim: Head dim D; columns beyond it are padding.
        block_m: Queries of a block.
        block_n: Keys of a tile.
        block_d: Columns of a tile of queries and keys.
        stages: Pipeline stages of queries.
        dq_from_registers: True if the consumer warpgroups add dq to global memory themselves.
        deterministic: True if partial dq must be added in the order of the keys.
        value_dim: Head dim Dv of the values in differential attention.
        block_dv: Columns of a tile of values, of differential attention.
        num_k: Tensors of keys: 2 for differential attention with one k per branch.
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
        tiles: Fields of the tiles from the scheduler, int32.
        tile_bars: Pipeline of the tiles.
        q_bars: Pipeline of the queries.
        k_ready: mbarriers of keys; named barriers say which stages are empty.
        v_ready: mbarriers of values, likewise.
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
        k: Halves of the tile's keys, [2 * num_k, 64, block_d].
        v: Halves of its values, [2, 64, block_dv].
        q: Queries, one or two buffers per stage.
        dout: Gradients of out, [stages, block_m, block_dv].
        lse: Base-2 logsumexp of the queries.
        delta: rowsum(dout * out), and the other terms that dS subtracts.
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
    """A tile of queries from the tile scheduler.

    Attributes:
        end_q: End of the document's queries in the pack.
        length_q: Queries of the document.
        end_k: End of the document's keys in the pack.
        length_k: Keys of the document.
        first: First query of the tile in the document.
        head: First query head of the tile.
        low: First block of keys.
        high: End of the blocks of keys.
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
    """A tile of keys with the blocks of queries that see it.

    Attributes:
        head_kv: Index of the key/value head.
        begin_q: First query of the document in the pack.
        length_q: Queries of the document.
        begin_k: First key of the document in the pack.
        length_k: Keys of the document.
        first: First key of the tile in the document.
        low: First block of queries.
        high: End of the blocks of queries.
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
    """The tile of keys of a program, and its document.

    Attributes:
        head_kv: Index of the key/value head.
        document: Index in the pack; -1 for an empty slot.
        first: First key of the tile in the document.
        begin_q: First query of the document in the pack.
        length_q: Queries of the document.
        begin_k: First key of the document in the pack.
        length_k: Keys of the document.
    """

    head_kv: Any
    document: Any
    first: Any
    begin_q: Any
    length_q: Any
    begin_k: Any
    length_k: Any


class SeedWords(NamedTuple):
    """Key of the random bits of a document; see draw_bits.

    Attributes:
        key_0: Low half of the seed.
        key_1: High half of the seed.
        document: Document id.
    """

    key_0: Any
    key_1: Any
    document: Any


class DropoutKey(NamedTuple):
    """Counters and key of the random bits of a tile; see draw_bits.

    Attributes:
        key_0: Low half of the seed.
        key_1: High half of the seed.
        document: Document id.
        head: Query heads of the rows.
        first: First query of the tile.
        local_query: Queries in the tile.
    """

    key_0: Any
    key_1: Any
    document: Any
    head: Any
    first: Any
    local_query: Any


class Scalars(NamedTuple):
    """Numbers of a call that a consumer warpgroup reads.

    Attributes:
        total_q: Number of packed queries T.
        scale: softmax_scale, the factor of q.k.
        softcap: Softcap c, which replaces a logit x by c tanh(x / c); None without one.
        threshold: A weight is dropped if its 16 random bits are below this number.
        keep_scale: 1 / keep probability, the factor of kept weights.
    """

    total_q: Any
    scale: Any
    softcap: Any
    threshold: Any
    keep_scale: Any


class ConsumerPointers(NamedTuple):
    """Tensors that a consumer warpgroup of a forward reads or writes by itself.

    Attributes:
        lse: [H, T] float32, the result.
        factor: [H] learnable sinks, or [N] factors of the logits; may be None.
        dropout_seed: Seed of the dropout mask, [1] int64; None without dropout.
        document_ids: Ids of the documents, [N] int32, part of the dropout key; or None.
    """

    lse: Any
    factor: Any
    dropout_seed: Any
    document_ids: Any


class Statistics(NamedTuple):
    """Numbers per query that the loader of a backward fetches.

    Attributes:
        lse: Base-2 logsumexp, [H, T] float32; with other numbers behind it for some kernels.
        delta: rowsum(dout * out) - dlse, [H, T] float32, or None.
        total_q: Number of packed queries T.
    """

    lse: Any
    delta: Any
    total_q: Any


class Semaphores(NamedTuple):
    """Counters of the partial dq that have reached global memory.

    Attributes:
        pointer: Zeroed int32 [H, per_head].
        per_head: Counters of a head.
        document: Index in the pack.
    """

    pointer: Any
    per_head: Any
    document: Any


class KeyGradients(NamedTuple):
    """Gradients of one layout that a tile of keys stores.

    Attributes:
        dk: [Tk, Hk, D].
        dv: [Tk, Hk, D].
        token: Distance between tokens, in elements.
        head: Distance between heads.
    """

    dk: Any
    dv: Any
    token: Any
    head: Any


class DropoutInputs(NamedTuple):
    """Dropout of a document.

    Attributes:
        seed: Seed of the dropout mask, [1] int64; None without dropout.
        document_ids: Ids of the documents, [N] int32, part of the dropout key; or None.
        document: Index in the pack.
        threshold: A weight is dropped if its 16 random bits are below this number.
    """

    seed: Any
    document_ids: Any
    document: Any
    threshold: Any


class Factors(NamedTuple):
    """Numbers of a call that the backward multiplies by.

    Attributes:
        scale: softmax_scale, the factor of q.k.
        softcap: Softcap c, which replaces a logit x by c tanh(x / c).
        keep_scale: 1 / keep probability, the factor of kept weights.
    """

    scale: Any
    softcap: Any
    keep_scale: Any


class DqSlabs(NamedTuple):
    """The buffer to which dq is added from registers; see first_slab.

    Attributes:
        pointer: Slab of the first block of queries of the first head.
        per_head: Slabs of a head.
    """

    pointer: Any
    per_head: Any


class SchedulerInputs(NamedTuple):
    """Inputs of the tile scheduler.

    Attributes:
        cu_seqlens_q: Cumulative query lengths, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        tiles: [n, 2] int32 of a TileSchedule.
        counter: A zeroed int32, which programs take their next item from.
        num_items: Items of work.
    """

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    counter: Any
    num_items: Any
