"""Reads the data that an R package stores: lists, vectors and texts, without R.

R packs the objects of a package into two files. `<name>.rdb` holds the objects one after the other,
each compressed by zlib after its length. `<name>.rdx` is a list with their names and places. Both
hold R's serialization in its big-endian form: "Serialization Formats" in the manual "R Internals".
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FORM = b"X\n"  # big-endian binary
SYMBOL, PAIRS, CHARACTERS = 1, 2, 9
LOGICAL, INTEGER, REAL, STRING, LIST = 10, 13, 14, 16, 19
NULL, REFERENCE = 254, 255
HAS_ATTRIBUTES, HAS_TAG = 0x200, 0x400
NUMBERS = {LOGICAL: "i", INTEGER: "i", REAL: "d"}
DAMAGE = (
    *(AttributeError, EOFError, LookupError, OSError, RecursionError, TypeError, ValueError),
    *(struct.error, zlib.error),
)
ZLIB = 1  # value of `compressed` in the list of places


def read_objects(places: bytes, objects: bytes) -> dict[str, Any]:
    """Returns the objects of a package by name.

    Args:
        places: Content of the file `.rdx`.
        objects: Content of the file `.rdb`.

    Returns:
        A list of strings or numbers for a vector, a dictionary for a list with names.

    Raises:
        ValueError: if a file is damaged, or holds something else than vectors and lists.
    """
    with _whole():
        index = _Parser(gzip.decompress(places)).parse()
        variables, compressed = index["variables"], index["compressed"]
        if compressed != [ZLIB]:
            raise _unknown("the compression", compressed)
        found = {}
        for name, (start, size) in variables.items():
            entry = objects[start : start + size]
            content = zlib.decompress(entry[4:])  # after the length, 4 bytes
            if struct.unpack(">I", entry[:4]) != (len(content),):
                raise _damaged(f"{name} of {len(content)} bytes")
            found[name] = _Parser(content).parse()
    return found


@contextmanager
def _whole() -> Iterator[None]:
    """Context manager that reports the errors of damaged data as such.

    A damaged length, type or reference can raise any error of Python's own types.
    """
    try:
        yield
    except _RefusedError:
        raise
    except DAMAGE as error:
        raise _damaged(str(error)) from error


def parse(content: bytes) -> Any:
    """Returns the object that R serialized: see `read_objects`.

    Raises:
        ValueError: if the content is damaged, or holds something else than vectors and lists.
    """
    with _whole():
        return _Parser(content).parse()


class _Parser:
    """Reads one serialized object from its first byte to its last."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._place = len(FORM)
        self._symbols: list[Any] = []

    def parse(self) -> Any:
        if self._content[:2] != FORM:
            raise _unknown("the form", self._content[:2])
        version, _, _ = self._integers(3)
        if version == 3:
            self._take(self._integer())  # the name of the encoding
        found = self._object()
        if self._place != len(self._content):
            raise _damaged(f"{len(self._content) - self._place} bytes after its end")
        return found

    def _object(self) -> Any:
        flags = self._integer() & 0xFFFFFFFF
        kind = flags & 0xFF
        if kind == NULL:
            return None
        if kind == REFERENCE:
            number = flags >> 8  # from 1
            if not 0 < number <= len(self._symbols):
                raise _damaged(f"a reference to the symbol {number} of {len(self._symbols)}")
            return self._symbols[number - 1]
        if kind == SYMBOL:
            self._symbols.append(self._object())
            return self._symbols[-1]
        if kind == CHARACTERS:
            size = self._integer()
            return None if size < 0 else self._take(size).decode("utf-8")
        if kind == PAIRS:
            return self._pairs(flags)
        if kind in NUMBERS:
            size = self._integer()
            form = f">{size}{NUMBERS[kind]}"
            found: Any = list(struct.unpack(form, self._take(struct.calcsize(form))))
        elif kind in (STRING, LIST):
            found = [self._object() for _ in range(self._integer())]
        else:
            raise _unknown("the type", kind)
        attributes = self._object() if flags & HAS_ATTRIBUTES else {}
        if kind == LIST and "names" in attributes:
            return dict(zip(attributes["names"], found, strict=True))
        return found

    def _pairs(self, flags: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while flags & 0xFF == PAIRS:
            if flags & HAS_ATTRIBUTES:
                self._object()
            tag = self._object() if flags & HAS_TAG else None
            found[str(tag)] = self._object()
            flags = self._integer()
        return found

    def _integer(self) -> int:
        return self._integers(1)[0]

    def _integers(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f">{count}i", self._take(4 * count))

    def _take(self, size: int) -> bytes:
        part = self._content[self._place : self._place + size]
        if len(part) != size:
            raise _damaged("an end within an object")
        self._place += size
        return part


class _RefusedError(ValueError):
    """Data that is damaged, or of another kind."""


def _damaged(what: str) -> ValueError:
    return _RefusedError(
        f"data of an R package must be whole, got {what}. Fetch the package again."
    )


def _unknown(what: str, value: Any) -> ValueError:
    return _RefusedError(
        f"data of an R package must be vectors and lists, compressed by zlib, got {what} "
        f"{value!r}. Fetch the version of the package that the recipe names."
    )
