"""Writes and verifies the checksum of a checkpoint file, without torch."""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

TAG = b"lctrain sha256 "
SEAL_BYTES = len(TAG) + 64
NO_COMMENT = b"\0\0"  # length of the comment, the last two bytes of an archive without one
BLOCK = 2**22  # bytes that are hashed at a time


class DamagedCheckpointError(ValueError):
    """Raised if a file differs from what was written, or is not a checkpoint."""


def seal(file: BinaryIO, digest: str) -> None:
    """Writes a hash into the comment of a zip archive.

    Args:
        file: Archive without a comment, open for reading and writing.
        digest: SHA-256 of the archive, in hexadecimal digits.
    """
    file.seek(-len(NO_COMMENT), os.SEEK_END)
    assert file.read(len(NO_COMMENT)) == NO_COMMENT, "torch.save has written a comment"
    file.seek(-len(NO_COMMENT), os.SEEK_END)
    file.write(struct.pack("<H", SEAL_BYTES) + TAG + digest.encode())


def damage_of(path: Path) -> str | None:
    """Verifies a checkpoint file, and returns a description of the damage; None if it is intact.

    A file without lctrain's checksum, such as one from Lightning, is verified by the CRC-32 of each
    record of the archive.
    """
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    with path.open("rb") as file:
        file.seek(max(0, size - SEAL_BYTES))
        comment = file.read()
        if comment.startswith(TAG):
            digest = _digest(file, size - SEAL_BYTES - len(NO_COMMENT))
            then = comment[len(TAG) :].decode(errors="replace")
            return None if digest == then else f"its SHA-256 is {digest[:12]}, not {then[:12]}"
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError):
        return "it is cut short, or no checkpoint"
    return None if record is None else f"its record {record} does not have its CRC-32"


def _digest(file: BinaryIO, size: int) -> str:
    """Returns the SHA-256 of the file's first `size` bytes, followed by NO_COMMENT."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0:
        block = file.read(min(BLOCK, size))
        if not block:
            break
        digest.update(block)
        size -= len(block)
    digest.update(NO_COMMENT)
    return digest.hexdigest()
