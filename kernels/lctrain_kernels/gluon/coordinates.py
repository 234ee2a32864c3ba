"""Named tuples that give the rows, keys and queries on which a helper of a Hopper kernel works."""

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
    """Attention window of a call, from device memory or from launch arguments.

    Attributes:
        pointer: (left, right) in device memory, [2] int32, or None.
        left: Visible keys before a query's own position, used if pointer is None.
        right: Visible keys after a query's own position, used if pointer is None.
    """

    pointer: Any
    left: Any
    right: Any


class Bounds(NamedTuple):
    """Attention window in keys. A side without a bound is UNBOUNDED.

    Attributes:
        left: Visible keys before a query's own position.
        right: Visible keys after a query's own position.
    """

    left: Any
    right: Any


class LocalQueries(NamedTuple):
    """Query positions of the rows of a warpgroup.

    Attributes:
        first: Position of the first query in the document.
        local_query: Position of each row's query, relative to `first`.
    """

    first: Any
    local_query: Any


class Visible(NamedTuple):
    """Range of keys that the rows of a warpgroup see.

    Attributes:
        shift: Number of keys less number of queries of the document.
        length_k: Number of keys of the document.
        left: Visible keys before a query's own position.
        right: Visible keys after a query's own position.
        clear_low: Key position; blocks that start before it need a mask.
        clear_high: Key position; blocks that end after it need a mask.
    """

    shift: Any
    length_k: Any
    left: Any
    right: Any
    clear_low: Any
    clear_high: Any


class KeyBounds(NamedTuple):
    """Bounds from which the mask of a warpgroup's keys is computed.

    All positions are relative to the warpgroup's first key.

    Attributes:
        keys_here: Number of keys from the first key to the document's end.
        reach: Last key that query 0 of the document sees.
        past: First key that query 0 of the document sees.
    """

    keys_here: Any
    reach: Any
    past: Any
