"""Writes and verifies checksums of checkpoints, without torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

TAG = b"lctrain sha256 "
SEAL_BYTES = len(TAG) + 64
NO_COMMENT = b"\0\0"  # last two bytes of a zip archive without comment: the comment's length 0
META = "meta.pt"  # file of a sharded checkpoint: all except weights and optimizer states
MANIFEST = "manifest.json"  # file of a sharded checkpoint: the SHA-256 of every other file
BLOCK = 2**22  # bytes that are hashed at a time


class DamagedCheckpointError(ValueError):
    """Raised if a checkpoint's bytes differ from those written, or it is no checkpoint."""


def seal(file: BinaryIO, digest: str) -> None:
    """Writes a hash into the comment field of a zip archive.

    Args:
        file: Archive without a comment, open for reading and writing.
        digest: SHA-256 of the archive, in hexadecimal digits.
    """
    file.seek(-len(NO_COMMENT), os.SEEK_END)
    assert file.read(len(NO_COMMENT)) == NO_COMMENT, "torch.save has written a comment"
    file.seek(-len(NO_COMMENT), os.SEEK_END)
    file.write(struct.pack("<H", SEAL_BYTES) + TAG + digest.encode())


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a file, or the folder of a sharded checkpoint."""
    return path.is_file() or (path / MANIFEST).is_file()


def remove(path: Path) -> None:
    """Deletes a checkpoint, a file or a folder, if it exists.

    Args:
        path: Path of the checkpoint.

    Raises:
        OSError: if it cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    """Writes the hashes of a sharded checkpoint's files, by name, into its folder."""
    with (folder / MANIFEST).open("w") as file:
        json.dump(digests, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def digest_of(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return _digest(file, path.stat().st_size, b"")


def damage_of(path: Path) -> str | None:
    """Verifies a checkpoint, and returns a description of the damage; None if it is intact.

    Every file of a sharded checkpoint is verified. A file without lctrain's checksum, such as one
    from Lightning, is verified by the CRC-32 of each record of the archive.
    """
    if path.is_dir():
        return _damage_of_folder(path)
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    with path.open("rb") as file:
        file.seek(max(0, size - SEAL_BYTES))
        comment = file.read()
        if comment.startswith(TAG):
            digest = _digest(file, size - SEAL_BYTES - len(NO_COMMENT), NO_COMMENT)
            then = comment[len(TAG) :].decode(errors="replace")
            return None if digest == then else f"its SHA-256 is {digest[:12]}, not {then[:12]}"
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError):
        return "it is cut short, or no checkpoint"
    return None if record is None else f"its record {record} does not have its CRC-32"


def _damage_of_folder(folder: Path) -> str | None:
    try:
        digests: dict[str, str] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"its {MANIFEST} cannot be read"
    for name, then in digests.items():
        if not (folder / name).is_file():
            return f"its file {name} is missing"
        digest = digest_of(folder / name)
        if digest != then:
            return f"the SHA-256 of its file {name} is {digest[:12]}, not {then[:12]}"
    return None


def _digest(file: BinaryIO, size: int, end: bytes) -> str:
    """Returns the SHA-256 of the file's first `size` bytes, followed by `end`."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0:
        block = file.read(min(BLOCK, size))
        if not block:
            break
        digest.update(block)
        size -= len(block)
    digest.update(end)
    return digest.hexdigest()
