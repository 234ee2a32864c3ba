"""Named tuples that tell a device function of a Hopper kernel where its rows or keys are.

Positions count from a document's first token; indices in the pack count from the first token of
all documents.
"""

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl

RAGGED = gl.constexpr(1 << 30)  # size of a descriptor's row dimension; see ragged_descriptor


class Rows(NamedTuple):
    """Coordinates of the rows of a document that a TMA copy reads or writes.

    Attributes:
        end: Index in the pack after the document's last token.
        row: TMA row coordinate of the first row; see ragged_descriptor.
        head: Index of the head.
    """

    end: Any
    row: Any
    head: Any


class QueryRows(NamedTuple):
    """Coordinates of the queries, or of the results, of one tile.

    Attributes:
        end: Index in the pack after the document's last query.
        length: Number of queries of the document.
        first: Position of the first query in the document.
        head: Index of the first query head.
    """

    end: Any
    length: Any
    first: Any
    head: Any


class OutputKeys(NamedTuple):
    """Coordinates of the rows of dk or dv that a warpgroup stores.

    Attributes:
        first: Position of the first key in the document.
        end: Position in the document after the last key to store.
        begin: Index in the pack of the document's first key.
        head: Index of the key/value head.
    """

    first: Any
    end: Any
    begin: Any
    head: Any


class Window(NamedTuple):
    """Arguments from which a kernel reads its attention window; load_window turns them into Bounds.

    Attributes:
        pointer: (left, right) in device memory, [2] int32, or None.
        left: Visible keys before a query's own position, used if pointer is None; -1 is unbounded.
        right: Visible keys after a query's own position, used if pointer is None; -1 is unbounded.
    """

    pointer: Any
    left: Any
    right: Any


class Bounds(NamedTuple):
    """Attention window of a call, in numbers of keys. A side without a bound is 2^30.

    Attributes:
        left: Visible keys before a query's own position.
        right: Visible keys after a query's own position.
    """

    left: Any
    right: Any


class LocalQueries(NamedTuple):
    """Query positions of the 64 rows of a consumer warpgroup.

    Attributes:
        first: Position of the first query in the document.
        local_query: Position of each row's query relative to `first`, [64] int32.
    """

    first: Any
    local_query: Any


class Visible(NamedTuple):
    """Range of keys that the rows of a consumer warpgroup see.

    Attributes:
        shift: Number of keys minus number of queries of the document.
        length_k: Number of keys of the document.
        left: Visible keys before a query's own position.
        right: Visible keys after a query's own position.
        clear_low: Key position; blocks of keys that start before it need a mask.
        clear_high: Key position; blocks of keys that end after it need a mask.
    """

    shift: Any
    length_k: Any
    left: Any
    right: Any
    clear_low: Any
    clear_high: Any


class KeyBounds(NamedTuple):
    """Bounds from which the backward masks a warpgroup's keys against a block of queries.

    All positions are relative to the warpgroup's first key.

    Attributes:
        keys_here: Number of keys from the warpgroup's first key to the document's end.
        reach: Last key that query 0 of the document sees. Query i sees up to key i + reach.
        past: First key that query 0 of the document sees. Query i sees keys from i + past on.
    """

    keys_here: Any
    reach: Any
    past: Any
