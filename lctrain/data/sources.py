"""Sources of documents: each source loads texts as a `datasets.Dataset`.

A source is a frozen dataclass of plain values, so that Hydra can build it and errors can show it.
`load()` returns the documents to train on. `load_held_out()` returns the documents that the user
named to hold out; if it returns None, a part of the documents of `load()` is held out.
"""

from __future__ import annotations

import abc
import os
import sysconfig
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lctrain.data.faults import check_on_error, report_faults
from lctrain.data.limits import choose_by_hash, head
from lctrain.data.parquet import read_parquet
from lctrain.data.readers import File, Row, describe_files, match_files, read_jsonl, read_text
from lctrain.data.streams import check_encoding

if TYPE_CHECKING:
    from datasets import Dataset

_NO_SOURCES = frozenset({"__pycache__"})
_ROWS_AT_A_TIME = 100  # a thousand long texts take gigabytes
NOT_STANDARD = _NO_SOURCES | {"site-packages", "dist-packages"}


@dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """Base class of all sources of documents.

    Attributes:
        max_documents: Largest number of documents to use; None for all.
        max_bytes: UTF-8 bytes of text to use. The first document is used even if it is longer. None
            for all.
        on_error: "skip" leaves out documents that cannot be read, counts them and warns; "raise"
            stops at the first one.
    """

    max_documents: int | None = None
    max_bytes: int | None = None
    on_error: str = "skip"

    def __post_init__(self) -> None:
        check_on_error(self.on_error)
        for name in ("max_documents", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}. Use null for no limit.")

    @abc.abstractmethod
    def load(self, cache_dir: Path) -> Dataset:
        """Returns a dataset with the column "text" and, optionally, "name" and "fault".

        The meaning of the columns is that of the rows in `lctrain.data.readers`: a null text with a
        fault could not be read, and a null text without a fault is an empty document.

        Args:
            cache_dir: Cache folder of the data module.

        Raises:
            ValueError: if no document can be read; with on_error="raise", if any document cannot be
                read.
        """

    def load_held_out(self, cache_dir: Path) -> Dataset | None:
        """Returns the documents to hold out, or None to hold out a part of those of `load()`."""
        return None


@dataclass(frozen=True, kw_only=True)
class StdlibSource(Source):
    """Source of the Python files of the running interpreter's standard library, tests included.

    With max_documents or max_bytes, the files are chosen by a hash of their path, which mixes the
    modules.
    """

    def load(self, cache_dir: Path) -> Dataset:
        """Returns the files as documents, one row per file; Source.load describes the columns.

        A file that is not UTF-8 is a row with a fault. The data module counts these rows and does
        not warn: the standard library contains such files on purpose, as test data.

        Raises:
            ValueError: if the standard library has no Python files.
        """
        root = standard_library()
        paths = python_files(root, without=NOT_STANDARD)
        if not paths:
            raise ValueError(
                f"the standard library must have .py files, got none under {root}. "
                "Use another data source, for example data=text."
            )
        files = describe_files(paths, [path.relative_to(root).as_posix() for path in paths])
        files = choose_by_hash(files, self.max_documents, self.max_bytes)
        return generate(read_text, cache_dir, self.on_error, files=files)


@dataclass(frozen=True, kw_only=True)
class FileSource(Source):
    """Base class of the sources that read files which the user names.

    Attributes:
        files: Files or globs (** crosses folders); each must match a file.
        held_out_files: Files or globs to hold out. If there are none, a part of the documents of
            `files` is held out.
    """

    suffix: ClassVar[str] = ".txt"

    files: tuple[str, ...] = ()
    held_out_files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("files", "held_out_files"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, (str, Path)) else value
            object.__setattr__(self, name, tuple(str(item) for item in value))

    def load(self, cache_dir: Path) -> Dataset:
        """Returns the documents of `files` up to the limits: see Source.

        Raises:
            ValueError: if a file or glob matches no file, or no document can be read; with
                on_error="raise", if any document cannot be read.
        """
        dataset = self._read(self._described(self.files), cache_dir)
        return report_faults(head(dataset, self.max_documents, self.max_bytes), self.on_error)

    def load_held_out(self, cache_dir: Path) -> Dataset | None:
        """Returns the documents of `held_out_files`, or None if there are none: see Source."""
        if not self.held_out_files:
            return None
        dataset = self._read(self._described(self.held_out_files), cache_dir)
        return report_faults(dataset, self.on_error)

    def _described(self, patterns: tuple[str, ...]) -> tuple[File, ...]:
        paths = match_files(patterns, self.suffix)
        return describe_files(paths, [path.as_posix() for path in paths])

    @abc.abstractmethod
    def _read(self, files: tuple[File, ...], cache_dir: Path) -> Dataset:
        """Returns the documents of the files as rows of `lctrain.data.readers`."""


@dataclass(frozen=True, kw_only=True)
class TextSource(FileSource):
    """Source of text files, one document each. Compressed files are decompressed.

    Attributes:
        encoding: Encoding of the files. None takes the encoding of a file's byte-order mark, else
            UTF-8. The mark is not part of the text.
    """

    encoding: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_encoding(self.encoding)

    def _read(self, files: tuple[File, ...], cache_dir: Path) -> Dataset:
        return generate(read_text, cache_dir, self.on_error, files=files, encoding=self.encoding)


@dataclass(frozen=True, kw_only=True)
class JsonlSource(FileSource):
    """Source of JSON lines: one document in each line. Compressed files are decompressed.

    A line that is not a JSON object, or lacks the field, is reported with its file and line number,
    and treated as `on_error` says.

    Attributes:
        field: Name of the field that holds the text; `doc.text` for a field in a nested object.
        encoding: Encoding of the files. None takes the encoding of a file's byte-order mark, else
            UTF-8.
    """

    suffix: ClassVar[str] = ".jsonl"

    field: str = "text"
    encoding: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_encoding(self.encoding)

    def _read(self, files: tuple[File, ...], cache_dir: Path) -> Dataset:
        return generate(
            read_jsonl,
            cache_dir,
            self.on_error,
            files=files,
            field=self.field,
            encoding=self.encoding,
        )


@dataclass(frozen=True, kw_only=True)
class ParquetSource(FileSource):
    """Source of Parquet files: one document in each row.

    A file without the column is reported, and treated as `on_error` says.

    Attributes:
        field: Name of the column that holds the text; `doc.text` for a field in a struct.
    """

    suffix: ClassVar[str] = ".parquet"

    field: str = "text"

    def _read(self, files: tuple[File, ...], cache_dir: Path) -> Dataset:
        return generate(read_parquet, cache_dir, self.on_error, files=files, field=self.field)


def standard_library() -> Path:
    """Returns the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def python_files(root: Path, without: Set[str] = _NO_SOURCES) -> list[Path]:
    """Returns the .py files below a folder, sorted.

    Args:
        root: Folder to search.
        without: Names of folders that are not entered, and of files that are left out.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in without]
        sources = (name for name in names if name.endswith(".py") and name not in without)
        found += [os.path.join(folder, name) for name in sources]
    found = [path for path in found if os.path.isfile(path)]  # links may be broken
    return [Path(path) for path in sorted(found, key=lambda path: path.split(os.sep))]


def generate(
    reader: Callable[..., Iterator[Row]], cache_dir: Path, on_error: str, **arguments: Any
) -> Dataset:
    """Returns the documents that a reader yields, from the cache of `datasets` if they are there.

    Args:
        reader: Generator function that yields rows: see `lctrain.data.readers`.
        cache_dir: Cache folder of the data module.
        on_error: One of ON_ERROR: "skip" or "raise".
        **arguments: Arguments of the reader.

    Raises:
        ValueError: if the reader raises it; with on_error="raise", if a document cannot be read.
    """
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    features = {"text": Value("large_string"), "name": Value("string"), "fault": Value("string")}
    try:
        return Dataset.from_generator(
            _rows,
            features=Features(features),
            gen_kwargs={"reader": reader, "on_error": on_error, "arguments": arguments},
            cache_dir=str(cache_dir / "datasets"),
            writer_batch_size=_ROWS_AT_A_TIME,
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise


def _rows(
    reader: Callable[..., Iterator[Row]], on_error: str, arguments: dict[str, Any]
) -> Iterator[Row]:
    for row in reader(**arguments):
        if on_error == "raise" and row["fault"] is not None and row["text"] != "":
            raise ValueError(row["fault"])  # before the rest is read
        yield row
