"""Opens files as streams of bytes, and detects their compression and encoding.

The first bytes of a file decide, not its name. So a `.gz` file that is not compressed can be read,
and a compressed file without a suffix as well.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from typing import Any

DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""Exceptions that reading a missing, truncated or damaged file raises; pyarrow's are OSErrors."""

PARQUET = b"PAR1"
"""First bytes of a Parquet file."""

_HEAD = 8192  # bytes at the beginning of a file that are inspected
_TAR = slice(257, 262)
_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FOREIGN = (
    (PARQUET, "a Parquet file", "Read it with data=parquet."),
    (b"ARROW1", "an Arrow file", "Read its folder with data=hub data.dataset=<folder>."),
    (b"PK\x03\x04", "a zip archive or an office document", "Unpack it, or save it as text."),
    (b"%PDF", "a PDF", "Convert it to text."),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it."),
    (b"SQLite format 3", "a SQLite database", "Export its text as JSON lines."),
    (
        b"version https://git-lfs.github.com/spec/",
        "a pointer of Git LFS, not the file itself",
        "Fetch the file with `git lfs pull` in its repository.",
    ),
)


class ForeignFileError(ValueError):
    """Raised if a file is not text but of another type, such as a PDF."""


def open_bytes(path: str) -> Any:
    """Opens a file as a binary stream; gzip, bzip2, xz, zstd and lz4 are decompressed.

    Raises:
        OSError: if the file cannot be opened. Reading the stream may raise any error in DAMAGE.
    """
    with open(path, "rb") as file:
        head = file.read(6)
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(path, "rb")
    if head.startswith(b"BZh"):
        return bz2.open(path, "rb")
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.open(path, "rb")
    for magic, codec in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x04\x22\x4d\x18", "lz4")):
        if head.startswith(magic):
            import pyarrow as pa

            stream = pa.CompressedInputStream(pa.OSFile(path), codec)
            return io.BufferedReader(stream)
    return open(path, "rb")


def encoding_of(head: bytes, encoding: str | None) -> str:
    """Returns the encoding of a text: `encoding`, else the byte-order mark's, else UTF-8.

    Args:
        head: First bytes of the text.
        encoding: Encoding that the user set, or None.
    """
    if encoding is not None:
        return codecs.lookup(encoding).name.removesuffix("-sig")
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")


def check_text(head: bytes, path: str, encoding: str) -> None:
    """Raises ForeignFileError if the first bytes of a file show that it is not text.

    Args:
        head: First bytes of the file, decompressed.
        path: Path of the file, for the message.
        encoding: Encoding with which the file will be read.
    """
    known = known_type(head)
    if known is not None:
        raise ForeignFileError(f"files must be text, got {path}, which is {known}")
    if head[_TAR] == b"ustar":
        raise ForeignFileError(
            f"files must be text, got {path}, which is a tar archive. Unpack it."
        )
    if encoding == "utf-8" and b"\0" in head:
        raise ForeignFileError(
            f"files must be text, got {path}, which holds zero bytes. It is binary, or UTF-16 "
            "without a byte-order mark: leave it out of data.files, or set data.encoding=utf-16-le."
        )


def known_type(head: bytes) -> str | None:
    """Returns the type of a file that is not text, with the remedy, as text.

    Args:
        head: First bytes of the file, decompressed.
    """
    for magic, kind, remedy in _FOREIGN:
        if head.startswith(magic):
            return f"{kind}. {remedy}"
    return None


def check_encoding(encoding: str | None) -> None:
    """Raises ValueError unless `encoding` is None or a text encoding that Python knows."""
    try:
        "".encode(encoding or "utf-8")
    except LookupError as error:  # unknown, or not one of text
        raise ValueError(
            f"encoding must be one that Python knows, got {encoding!r}. Use for example latin-1, "
            "or null for UTF-8 and what a byte-order mark says."
        ) from error


def peek(stream: Any) -> tuple[bytes, io.BufferedReader]:
    """Returns the first bytes of a stream, and a stream that begins with them again."""
    buffered = io.BufferedReader(stream, _HEAD)
    return buffered.peek(_HEAD)[:_HEAD], buffered
