"""Readers of text files and JSON lines: each yields one row {"text", "name", "fault"} per document.

The fault of a row is None, or a message that names the place, the error and the remedy:

- text and no fault: the document was read;
- no text and no fault: the document is empty (null);
- no text and a fault: the line or the file could not be read;
- text and a fault: the document was repaired, or read in part; a text of "" stands for an empty
  file.

A file is given as (path, name, size, modification time). Size and modification time are part of the
arguments because the cache of `datasets` is keyed by them: a changed file is then read again.
"""

from __future__ import annotations

import codecs
import glob
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lctrain.data.fields import (
    BYTE_ORDER_MARK,
    FieldError,
    decode,
    find_field,
    replace_surrogates,
)
from lctrain.data.streams import (
    DAMAGE,
    ForeignFileError,
    check_text,
    encoding_of,
    open_bytes,
    peek,
)
from lctrain.local_paths import SCHEME

File = tuple[str, str, int, int]
Row = dict[str, str | None]

_LINE_PREVIEW = 80
_CHUNK = 2**20  # bytes
_MARK = codecs.BOM_UTF8
_RESTORE = "Restore the file, or leave it out of data.files."


def describe_files(paths: Sequence[Path], names: Sequence[str]) -> tuple[File, ...]:
    """Returns (path, name, size in bytes, modification time in nanoseconds) of every file."""
    stats = [path.stat() for path in paths]
    return tuple(
        (str(path), name, stat.st_size, stat.st_mtime_ns)
        for path, name, stat in zip(paths, names, stats, strict=True)
    )


def match_files(patterns: Sequence[str], suffix: str = ".txt") -> list[Path]:
    """Returns the files that match, each once, sorted within each pattern.

    Args:
        patterns: Files and globs (** crosses folders).
        suffix: File suffix that the error message suggests if a pattern is a folder.

    Raises:
        ValueError: if a pattern matches no file.
    """
    if not patterns:
        raise ValueError("files must name at least one file or glob, got none. Set data.files.")
    found: dict[Path, None] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        matches = [Path(match) for match in sorted(glob.glob(expanded, recursive=True))]
        if not matches and Path(expanded).exists():  # a name that holds glob characters
            matches = [Path(expanded)]
        files = [match for match in matches if match.is_file()]
        if not files:
            raise ValueError(
                f"files must match at least one file, got {pattern!r} which matches none"
                f"{_folder_hint(Path(expanded), suffix)}. "
                f"Check the path; it is relative to {os.getcwd()}."
            )
        found.update(dict.fromkeys(files))
    return list(found)


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _folder_hint(path: Path, suffix: str) -> str:
    if SCHEME.match(str(path)):
        return "; it is a URL, download the file or read a data set of the hub with data=hub"
    if not path.is_dir():
        return ""
    if is_saved_dataset(path):
        return f"; it is a folder of save_to_disk, read it with data=hub data.dataset={path}"
    return f"; it is a folder, append /**/*{suffix}"


def read_text(files: tuple[File, ...], encoding: str | None = None) -> Iterator[Row]:
    """Yields one document per text file.

    Args:
        files: Files to read, compressed or not.
        encoding: Encoding of the files. None takes the encoding of a file's byte-order mark, else
            UTF-8.
    """
    for path, name, *_ in files:
        parts: list[str] = []
        read = 0
        try:
            with open_bytes(path) as opened:
                head, stream = peek(opened)
                chosen = encoding_of(head, encoding)
                check_text(head, path, chosen)
                decoder = codecs.getincrementaldecoder(chosen)()
                while chunk := stream.read1(_CHUNK):
                    parts.append(decoder.decode(chunk))
                    read += len(chunk)
                parts.append(decoder.decode(b"", final=True))
        except UnicodeDecodeError as error:
            place = read + error.start - len(decoder.getstate()[0])
            yield fault(name, _not_text(path, chosen, place))
            continue
        except ForeignFileError as error:
            yield fault(name, str(error))
            continue
        except DAMAGE as error:
            yield fault(name, _damaged(path, error, f"{read:,} bytes"), "".join(parts) or None)
            continue
        text = "".join(parts).removeprefix(BYTE_ORDER_MARK)
        empty = None if text else f"files must hold text, got {path}, which is empty. Leave it out."
        yield {"text": text, "name": name, "fault": empty}


def _not_text(path: str, encoding: str, place: int) -> str:
    return (
        f"files must be {encoding.upper()} text, got {path} with byte {place} that is not. Set "
        "data.encoding to what it is in, as latin-1, convert it, or leave it out of data.files."
    )


def read_jsonl(files: tuple[File, ...], field: str, encoding: str | None = None) -> Iterator[Row]:
    """Yields one document per line of JSON; blank lines are skipped.

    Args:
        files: Files to read, compressed or not.
        field: Name of the field that holds the text, or the path to a nested field, with dots.
        encoding: Encoding of the files. None takes the encoding of a file's byte-order mark, else
            UTF-8.
    """
    yield from read_json_lines(files, partial(_text_of, field=field), f"field {field!r}", encoding)


def _text_of(record: Any, field: str) -> str | None:
    return decode(find_field(record, field), field)


def read_json_lines(
    files: tuple[File, ...],
    read: Callable[[Any], str | None],
    what: str,
    encoding: str | None = None,
) -> Iterator[Row]:
    """Yields one document per line of JSON, made by `read`; blank lines are skipped.

    Args:
        files: Files to read, compressed or not.
        read: Function from the JSON value of a line to the text of the document; None is an empty
            document. It raises FieldError if the value holds no document.
        what: Name of what a line holds, such as "a conversation", for error messages.
        encoding: Encoding of the files, as in `read_jsonl`.
    """
    for path, name, *_ in files:
        number, rows = 0, 0
        try:
            with open_bytes(path) as opened:
                head, stream = peek(opened)
                chosen = encoding_of(head, encoding)
                check_text(head, path, chosen)
                for number, line in enumerate(_lines(stream, chosen), start=1):
                    if line.strip():
                        rows += 1
                        yield _read_line(line, read, what, f"{path}:{number}", f"{name}:{number}")
            if rows == 0:
                message = f"files must hold JSON lines, got {path}, which is empty. Leave it out."
                yield fault(name, message, "")
        except UnicodeDecodeError:
            yield fault(
                f"{name}:{number + 1}",
                f"{path}:{number + 1}: the text must be {chosen.upper()}, got bytes that are not. "
                "Nothing is read from here on. Set data.encoding, or convert the file.",
            )
        except ForeignFileError as error:
            yield fault(name, str(error))
        except DAMAGE as error:
            yield fault(f"{name}:{number + 1}", _damaged(path, error, f"line {number}"))


def _lines(stream: io.BufferedReader, encoding: str) -> Iterator[bytes | str]:
    """Yields the lines of a stream: bytes for UTF-8, which `_parse` decodes, else strings."""
    if encoding == "utf-8":
        for line in stream:
            yield line.removeprefix(_MARK)  # concatenated files have byte-order marks inside
    else:
        for text in io.TextIOWrapper(stream, encoding=encoding, newline="\n"):
            yield text.removeprefix(BYTE_ORDER_MARK)


def _read_line(
    line: bytes | str, read: Callable[[Any], str | None], what: str, where: str, name: str
) -> Row:
    try:
        text = read(_parse(line))
    except FieldError as error:
        return fault(name, f"{where}: {error}")
    if text is None:
        return {"text": None, "name": name, "fault": None}
    text, surrogate = replace_surrogates(text)
    if surrogate is None:
        return {"text": text, "name": name, "fault": None}
    return fault(
        name,
        f"{where}: {what} must be Unicode text, got {surrogate}. It is replaced by "
        "U+FFFD; fix this line.",
        text,
    )


def _parse(line: bytes | str) -> Any:
    try:
        return json.loads(line if isinstance(line, str) else line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        start = line[:_LINE_PREVIEW]
        preview = start if isinstance(start, str) else start.decode("utf-8", errors="replace")
        raise FieldError(
            f"a line must be JSON, got {preview.strip()!r} ({error}). Fix or remove this line."
        ) from error


def fault(name: str, message: str, text: str | None = None) -> Row:
    """Returns the row of a document that could not be read, or was read in part.

    Args:
        name: Name of the document, line or file.
        message: Place, error and remedy.
        text: Text that was read in part or repaired; None if nothing could be read.
    """
    return {"text": text, "name": name, "fault": message}


def _damaged(path: str, error: BaseException, after: str) -> str:
    if isinstance(error, PermissionError):
        return (
            f"files must be readable, got {path}, which this user may not read. Change its "
            "permissions, or leave it out of data.files."
        )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"files must be readable, got {path}, which is damaged or truncated after {after} "
        f"({reason}). {_RESTORE}"
    )
