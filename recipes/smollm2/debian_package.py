"""Reads files out of a Debian package, which is an `ar` archive with a compressed tar archive."""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

MAGIC = b"!<arch>\n"
HEADER = 60  # bytes before the content of a member of an ar archive
DATA = "data.tar"


def read_files(package: Path, paths: list[str]) -> list[bytes]:
    """Returns the contents of files in a Debian package.

    Args:
        package: The package, a `.deb` file.
        paths: Paths of the files below the root, such as "usr/lib/...".

    Raises:
        ValueError: if the file is no Debian package, or lacks one of the files.
    """
    content = package.read_bytes()
    for name, member in _members(package, content):
        if name.startswith(DATA):
            try:
                return _unpack(package, member, paths)
            except (tarfile.TarError, lzma.LZMAError, EOFError, zlib.error) as error:
                raise ValueError(
                    f"package must be a whole Debian package, got {package}, whose {name} is "
                    "damaged. Fetch it again."
                ) from error
    raise ValueError(
        f"package must be a Debian package, got {package} without {DATA}. Fetch it again."
    )


def _members(package: Path, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields names and contents of the members of an ar archive."""
    if not content.startswith(MAGIC):
        raise ValueError(
            f"package must be a Debian package (.deb), got {package}, which is no ar archive. "
            "Fetch it again."
        )
    place = len(MAGIC)
    while place < len(content):
        header = content[place : place + HEADER]
        size = header[48:58].strip()
        if len(header) < HEADER or not size.isdigit() or place + HEADER + int(size) > len(content):
            raise ValueError(
                f"package must be a whole Debian package, got {package}, which is cut off. Fetch "
                "it again."
            )
        place += HEADER
        yield header[:16].decode("latin-1").strip().rstrip("/"), content[place : place + int(size)]
        place += int(size) + int(size) % 2  # members begin at even bytes


def _unpack(package: Path, member: bytes, paths: list[str]) -> list[bytes]:
    with tarfile.open(fileobj=io.BytesIO(member)) as archive:
        names = {name.removeprefix("./"): name for name in archive.getnames()}
        missing = [path for path in paths if path not in names]
        if missing:
            raise ValueError(
                f"package must hold {missing[0]}, got {package}, which does not. Fetch the "
                "version of the package that the recipe names."
            )
        files = [archive.extractfile(names[path]) for path in paths]
        return [b"" if file is None else file.read() for file in files]
