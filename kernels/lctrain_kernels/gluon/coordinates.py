"""Named tuples with the rows, keys and queries that a part of a Hopper kernel works on."""

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl

RAGGED = gl.constexpr(1 << 30)  # size of a descriptor's row dimension; see ragged_descriptor


class Rows(NamedTuple):
    """Rows of a document that the copy engine reads or writes.

    Attributes:
        end: End of the document in the pack.
        row: Row coordinate of the first one; see ragged_descriptor.
        head: Index of the head.
    """

    end: Any
    row: Any
    head: Any


class QueryRows(NamedTuple):
    """Rows of queries, or of results, of one tile.

    Attributes:
        end: End of the document in the pack.
        length: Queries of the document.
        first: First query in the document.
        head: First query head.
    """

    end: Any
    length: Any
    first: Any
    head: Any


class OutputKeys(NamedTuple):
    """Rows of dk or dv that a warpgroup stores.

    Attributes:
        first: First key in the document.
        end: End of the keys to store, in the document.
        begin: First key of the document in the pack.
        head: Index of the key/value head.
    """

    first: Any
    end: Any
    begin: Any
    head: Any


class Window(NamedTuple):
    """The window of a call.

    Attributes:
        pointer: int32 [2] on the device, or None.
        left: Keys to the left, where pointer is None.
        right: Keys to the right, likewise.
    """

    pointer: Any
    left: Any
    right: Any


class Bounds(NamedTuple):
    """The window in keys; UNBOUNDED where a side has no bound.

    Attributes:
        left: Keys before the own position.
        right: Keys behind it.
    """

    left: Any
    right: Any


class LocalQueries(NamedTuple):
    """Queries of a warpgroup's rows.

    Attributes:
        first: First query in the document.
        local_query: Query of each row, counted from it.
    """

    first: Any
    local_query: Any


class Visible(NamedTuple):
    """Range of keys that the rows of a warpgroup see.

    Attributes:
        shift: Keys less queries of the document.
        length_k: Keys of the document.
        left: Keys before the own position.
        right: Keys behind it.
        clear_low: Blocks that start below need a mask.
        clear_high: Blocks that end above need a mask.
    """

    shift: Any
    length_k: Any
    left: Any
    right: Any
    clear_low: Any
    clear_high: Any


class KeyBounds(NamedTuple):
    """Bounds of the queries that see a warpgroup's keys, relative to the first key.

    Attributes:
        keys_here: Keys from the first one to the document's end.
        reach: Last key that query 0 sees.
        past: First key that query 0 sees.
    """

    keys_here: Any
    reach: Any
    past: Any
