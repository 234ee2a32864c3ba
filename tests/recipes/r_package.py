"""Writes R's serialization and a Debian package, as test data for the recipe `smollm2`."""

import gzip
import io
import struct
import tarfile
import zlib

DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata"


def integers(*values: int) -> bytes:
    return struct.pack(f">{len(values)}i", *values)


def characters(text: str | None) -> bytes:
    """Returns a string of R; None is R's NA."""
    if text is None:
        return integers(0x09, -1)
    return integers(0x40009, len(text.encode())) + text.encode()


def names(*texts: str) -> bytes:
    """Returns the attribute `names`, and the end of the attributes."""
    return integers(0x402, 1) + characters("names") + vector(texts) + integers(0xFE)


def vector(values) -> bytes:
    """Returns a vector of strings, of integers or of floats."""
    if all(isinstance(value, int) for value in values):
        return integers(13, len(values), *values)
    if all(isinstance(value, float) for value in values):
        return integers(14, len(values)) + struct.pack(f">{len(values)}d", *values)
    return integers(16, len(values)) + b"".join(map(characters, values))


def named_list(**members: bytes) -> bytes:
    return integers(0x213, len(members)) + b"".join(members.values()) + names(*members)


def compressed(**members: bytes) -> bytes:
    """Returns the list of places of an .rdx file that names zlib."""
    return named_list(**members, compressed=vector([1]))


def serialized(body: bytes, version: int = 3) -> bytes:
    head = integers(version, 0x40201, 0x30500)
    return b"X\n" + head + (integers(5) + b"UTF-8" if version == 3 else b"") + body


def r_objects(objects: dict[str, bytes], compressed: int = 1) -> tuple[bytes, bytes]:
    """Returns the contents of the files .rdx and .rdb."""
    stored, places = b"", {}
    for name, body in objects.items():
        content = serialized(body)
        entry = struct.pack(">I", len(content)) + zlib.compress(content)
        places[name] = vector([len(stored), len(entry)])
        stored += entry
    index = named_list(
        variables=named_list(**places),
        references=integers(19, 0),
        compressed=vector([compressed]),
    )
    return gzip.compress(serialized(index)), stored


def tar_archive(files: dict[str, bytes], compression: str = "xz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def debian_package(files: dict[str, bytes], compression: str = "xz") -> bytes:
    """Returns a Debian package with the given files."""
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": tar_archive({"control": b"odd"}) + b"\n",
        f"data.tar.{compression}": tar_archive(files, compression),
    }
    return b"!<arch>\n" + b"".join(member(*item) for item in members.items())


def member(name: str, content: bytes) -> bytes:
    """Returns a member of an ar archive, which begins at an even byte."""
    head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
    return head + content + b"\n" * (len(content) % 2)


def novel_package(texts: dict[str, str]) -> bytes:
    """Returns a Debian package with the lines of texts, as r-cran-janeaustenr stores them."""
    lines = {name: vector(text.splitlines()) for name, text in texts.items()}
    places, objects = r_objects(lines)
    return debian_package({f"{DATA}.rdx": places, f"{DATA}.rdb": objects})
