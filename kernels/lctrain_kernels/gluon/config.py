"""Tile configurations of the Hopper kernels, by head dim.

Only the way in which dq is added depends on the documents' lengths, so a document gives the same
bits of all else in every pack.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lctrain_kernels.gluon.structures import BackwardShape, ForwardShape
from lctrain_kernels.options import AttentionOptions

CONSUMERS = 2  # warpgroups of a forward, of 64 rows each
REGISTERS = 168  # of each thread at entry; warp specialisation shares them out anew
REGISTERS_OF_THREE = 128  # the same, where a forward has three warpgroups


class ForwardTile(NamedTuple):
    """Tile sizes and pipeline stages of a Hopper forward kernel.

    Attributes:
        block_n: Number of keys of a block.
        stages: Number of pipeline stages of keys, and of values.
        q_stages: Number of pipeline stages of queries, each of which holds a tile of them.
        consumers: Number of consumer warpgroups, of 64 rows each. Only varlen_fwd_hopper_kernel
            supports numbers other than two.
        sync_before_products: Whether the warps of a warpgroup synchronise before the products of a
            block instead of after them. Only varlen_fwd_hopper_kernel reads it.
    """

    block_n: int
    stages: int
    q_stages: int
    consumers: int = CONSUMERS
    sync_before_products: bool = False


class BackwardTile(NamedTuple):
    """Tile sizes and pipeline stages of a Hopper backward kernel.

    Attributes:
        block_m: Number of queries of a block, 64. Only varlen_bwd_persistent_hopper_kernel has 128,
            with 64 columns and reduce_from_registers.
        stages: Number of pipeline stages of queries, 2 to barriers.MOST_STAGES.
        reduce_from_registers: Whether the consumer warpgroups add partial dq to global memory from
            registers. Otherwise the dQ warp adds it from shared memory.
    """

    block_m: int
    stages: int
    reduce_from_registers: bool = False


# Columns of a tile -> configuration; a head dim uses the next larger number of columns.
_FORWARD = {
    64: ForwardTile(128, 3, 2),
    128: ForwardTile(128, 2, 2, sync_before_products=True),
    256: ForwardTile(64, 2, 1),
}
_FORWARD_OF_ONE_HEAD = {64: ForwardTile(64, 4, 2, consumers=3)}
_BACKWARD = {
    64: BackwardTile(64, 4, reduce_from_registers=True),
    128: BackwardTile(64, 2),
    256: BackwardTile(64, 2, reduce_from_registers=True),
}
# The same without dropout, softcap and determinism, where it differs.
_BACKWARD_PLAIN = {
    64: BackwardTile(128, 2, reduce_from_registers=True),
    96: BackwardTile(64, 2, reduce_from_registers=True),
}
# The same where document_of_a_token is at least LONG. The zeroed buffer of dq costs time per token,
# and the dQ warp per product: it costs less with documents of 2,048 tokens, and more with 4,096.
_BACKWARD_LONG = {128: BackwardTile(64, 3, reduce_from_registers=True)}
LONG = 3000
BLOCK_N_BACKWARD = 128  # a block of the schedule
SLAB_ROWS = 16  # queries that a warp holds after a product


def forward_shape(
    tile: ForwardTile,
    columns: int,
    group: int,
    heads: int,
    pack: int,
    value_columns: int = 0,
    num_k: int = 1,
) -> ForwardShape:
    """Returns the compile-time constants of a Hopper forward kernel.

    Args:
        tile: Tile configuration.
        columns: Columns of a tile of queries and keys: the head dim, padded.
        group: Number of query heads per key/value head.
        heads: Number of query heads.
        pack: Number of query heads of one key/value head that share a tile.
        value_columns: Columns of a tile of values; given for differential attention only.
        num_k: Number of key tensors, 2 for differential attention with one k per branch.
    """
    return ForwardShape(
        group=group,
        heads=heads,
        pack=pack,
        consumers=tile.consumers,
        block_n=tile.block_n,
        block_d=columns,
        q_stages=tile.q_stages,
        stages=tile.stages,
        sync_before_products=tile.sync_before_products,
        block_dv=value_columns,
        num_k=num_k,
    )


def backward_shape(
    tile: BackwardTile,
    columns: int,
    group: int,
    heads_kv: int,
    head_dim: int,
    deterministic: bool = False,
    value_dim: int = 0,
    value_columns: int = 0,
    num_k: int = 1,
    slab_rows: int = SLAB_ROWS,
) -> BackwardShape:
    """Returns the compile-time constants of a Hopper backward kernel.

    Args:
        tile: Tile configuration.
        columns: Columns of a tile of queries and keys: the head dim, padded.
        group: Number of query heads per key/value head.
        heads_kv: Number of key/value heads.
        head_dim: Head dim D of queries and keys.
        deterministic: Whether partial dq must be added in the order of the keys.
        value_dim: Head dim Dv of the values in differential attention.
        value_columns: Columns of a tile of values; given for differential attention only.
        num_k: Number of key tensors, 2 for differential attention with one k per branch.
        slab_rows: Queries of a slab of the float32 buffer of dq, as slab_rows returns.
    """
    return BackwardShape(
        group=group,
        heads_kv=heads_kv,
        head_dim=head_dim,
        block_m=tile.block_m,
        block_n=BLOCK_N_BACKWARD if columns <= 128 else BLOCK_N_BACKWARD // 2,
        block_d=columns,
        stages=tile.stages,
        dq_from_registers=tile.reduce_from_registers,
        deterministic=deterministic,
        value_dim=value_dim,
        block_dv=value_columns,
        num_k=num_k,
        slab_rows=slab_rows,
    )


def slab_rows(total_q: int, documents: int) -> int:
    """Returns the queries of a slab of the float32 buffer to which dq is added from registers.

    Slabs of 16 queries of one document need fewer instructions. With less than 16 queries per
    document on average, most of their rows would be empty, so a slab is one query.

    Args:
        total_q: Number of packed queries.
        documents: Number of documents.
    """
    return SLAB_ROWS if total_q >= SLAB_ROWS * documents else 1


def is_persistent(tile: BackwardTile) -> bool:
    """Returns whether varlen_bwd_persistent_hopper_kernel runs a tile: blocks of 128 queries."""
    return tile.block_m == 128


def pack_heads(group: int) -> int:
    """Returns the number of query heads of one key/value head that share a tile of 128 rows.

    These heads read the same keys. A tile of several heads has fewer positions, so fewer of its
    rows lie beyond a document's end.
    """
    return next(heads for heads in (4, 2, 1) if group % heads == 0)


def forward_tile(columns: int, pack: int, has_dropout: bool) -> ForwardTile:
    """Returns the tile configuration of a Hopper forward kernel.

    Three warpgroups share a tile only with pack = 1 and without dropout: rows of several heads do
    not divide by three, and random bits need too many registers.

    Args:
        columns: Columns of a tile of queries and keys: 64, 128 or 256.
        pack: Number of query heads of one key/value head that share a tile.
        has_dropout: Whether attention weights are dropped.
    """
    free = pack == 1 and not has_dropout
    table = _FORWARD | _FORWARD_OF_ONE_HEAD if free else _FORWARD
    tile = _forward_override or table[columns]
    return tile if free else tile._replace(consumers=CONSUMERS)


def entry_registers(consumers: int) -> int:
    """Returns the registers per thread with which a forward kernel starts, its maxnreg.

    Warp specialisation then divides the registers again among producer and consumer warps.

    Args:
        consumers: Number of consumer warpgroups, 2 or 3.
    """
    return REGISTERS if consumers == CONSUMERS else REGISTERS_OF_THREE


def backward_tile(
    head_dim: int, deterministic: bool, plain: bool, long_documents: bool = False
) -> BackwardTile:
    """Returns the tile configuration of varlen attention's Hopper backward.

    Args:
        head_dim: Head dim D of queries and keys. Above 128 there is one form, which is not
            deterministic.
        deterministic: Whether dq must have the same bits in every run. The dQ warp then adds
            partial dq of blocks of 64 queries, even if override_tiles asks for another form.
        plain: Whether the call has neither dropout nor a softcap. With them, 128 queries need too
            many registers, even if override_tiles asks for them.
        long_documents: Whether a token's document has at least LONG tokens on average.
    """
    table = _BACKWARD
    if plain and not deterministic:
        table = _BACKWARD | _BACKWARD_PLAIN | (_BACKWARD_LONG if long_documents else {})
    in_table = table[min(columns for columns in table if columns >= head_dim)]
    if head_dim > 128:
        return in_table
    tile = _backward_override or in_table
    if deterministic:
        return tile._replace(block_m=64, reduce_from_registers=False)
    return tile if plain else tile._replace(block_m=64)


def document_of_a_token(tokens: int, documents: int, longest: int) -> float:
    """Returns a lower bound of the length of a token's document, averaged over all tokens.

    The average is sum(length^2) / sum(length): causal attention does about half as many products
    per token. It is at least what it would be if all documents but the longest were equally long.

    Args:
        tokens: Number of packed tokens.
        documents: Number of documents.
        longest: Length of the longest document; 0 or too large a number if it is not known.
    """
    if documents < 2 or tokens == 0:
        return float(tokens)
    longest = longest if 0 < longest <= tokens else 0
    longest = max(longest, tokens // documents)
    return (longest**2 + (tokens - longest) ** 2 / (documents - 1)) / tokens


def tile_of_call(
    shape: Sequence[int], documents: int, longest: int, options: AttentionOptions
) -> BackwardTile:
    """Returns the tile configuration of a call's backward.

    Args:
        shape: Shape of q, [T, H, D].
        documents: Number of documents.
        longest: Length of the longest document, in queries; 0 if it is not known.
        options: Options of the call.
    """
    tokens, _, head_dim = shape
    plain = not (options.has_dropout or options.softcap > 0)
    is_long = document_of_a_token(tokens, documents, longest) >= LONG
    return backward_tile(head_dim, options.deterministic, plain, is_long)


def sums_dq_apart(
    shape: Sequence[int], documents: int, longest: int, options: AttentionOptions
) -> bool:
    """Returns whether dq is first written once no program reads q any more.

    The dQ warp writes dq while other programs still read queries, and a kernel before it sets the
    rows of dq to 0 whose query sees no key.

    The arguments are those of tile_of_call.
    """
    return tile_of_call(shape, documents, longest, options).reduce_from_registers


@contextlib.contextmanager
def override_tiles(
    forward: ForwardTile | None = None, backward: BackwardTile | None = None
) -> Iterator[None]:
    """Context manager that replaces the Hopper kernels' tile configurations, for tuning and tests.

    Args:
        forward: Configuration of all forwards; None keeps the table's.
        backward: Configuration of all backwards; None keeps the table's.
    """
    global _forward_override, _backward_override
    saved = _forward_override, _backward_override
    _forward_override, _backward_override = forward, backward
    try:
        yield
    finally:
        _forward_override, _backward_override = saved


_forward_override: ForwardTile | None = None
_backward_override: BackwardTile | None = None
