"""Sources of documents. Every source loads a `datasets.Dataset` of texts.

A source is a frozen dataclass of plain values, so that Hydra can build it and errors can show it.
`load()` gives the documents that are split into train and held-out by content; `load_held_out()`
gives documents that the user set aside, or None.
"""

from __future__ import annotations

import abc
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
_ROWS_AT_A_TIME = 100  # of long texts, a thousand take gigabytes
NOT_STANDARD = _NO_SOURCES | {"site-packages", "dist-packages"}


@dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """Base class of all sources.

    Attributes:
        max_documents: Use at most this many documents; None for all.
        max_bytes: Use documents up to this much text, at least one; None for all.
        on_error: "skip" leaves out what cannot be read, counts it and warns; "raise" stops at the
            first fault.
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
        """Returns a dataset with the columns "text" and perhaps "name" and "fault".

        A text is None where it is a null, or where a fault says why it could not be read: see
        `lctrain.data.readers`.

        Raises:
            ValueError: if no document can be read; with on_error="raise", if one cannot.
        """

    def load_held_out(self, cache_dir: Path) -> Dataset | None:
        """Returns documents set aside by the user, or None to split off some of `load()`."""
        return None


@dataclass(frozen=True, kw_only=True)
class StdlibSource(Source):
    """The Python files of the running interpreter's standard library, its tests included.

    With a limit, the files are chosen by a hash of their path, so that they stay a mixture.
    """

    def load(self, cache_dir: Path) -> Dataset:
        """See Source. Files that are not UTF-8 are counted without a warning: some never are."""
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
    """Files that the user names.

    Attributes:
        files: Files or globs (** crosses folders); each must match.
        held_out_files: Files to hold out; without any, some documents of `files` are held out.
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
        """See Source. Raises ValueError for a glob without a match."""
        dataset = self._read(self._described(self.files), cache_dir)
        return report_faults(head(dataset, self.max_documents, self.max_bytes), self.on_error)

    def load_held_out(self, cache_dir: Path) -> Dataset | None:
        """See Source."""
        if not self.held_out_files:
            return None
        dataset = self._read(self._described(self.held_out_files), cache_dir)
        return report_faults(dataset, self.on_error)

    def _described(self, patterns: tuple[str, ...]) -> tuple[File, ...]:
        paths = match_files(patterns, self.suffix)
        return describe_files(paths, [path.as_posix() for path in paths])

    @abc.abstractmethod
    def _read(self, files: tuple[File, ...], cache_dir: Path) -> Dataset:
        """Returns what the files hold, faults included."""


@dataclass(frozen=True, kw_only=True)
class TextSource(FileSource):
    """Text files, one document each; compressed ones are decompressed.

    Attributes:
        encoding: Encoding of the files. None reads UTF-8, and UTF-16 or UTF-32 after a byte-order
            mark, which is not part of the text.
    """

    encoding: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_encoding(self.encoding)

    def _read(self, files: tuple[File, ...], cache_dir: Path) -> Dataset:
        return generate(read_text, cache_dir, self.on_error, files=files, encoding=self.encoding)


@dataclass(frozen=True, kw_only=True)
class JsonlSource(FileSource):
    """JSON objects, one a line; compressed files are decompressed.

    A line that is not JSON or lacks the field is a fault, named by file and line number.

    Attributes:
        field: The field that holds the text; `doc.text` for a field in a nested object.
        encoding: See TextSource.
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
    """Parquet files, one document a row; a file without the column is a fault.

    Attributes:
        field: The column that holds the text; `doc.text` for a field in a struct.
    """

    suffix: ClassVar[str] = ".parquet"

    field: str = "text"

    def _read(self, files: tuple[File, ...], cache_dir: Path) -> Dataset:
        return generate(read_parquet, cache_dir, self.on_error, files=files, field=self.field)


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def python_files(root: Path, without: Set[str] = _NO_SOURCES) -> list[Path]:
    """The .py files below a folder, sorted, without those below folders of some names."""
    return sorted(
        path
        for path in root.rglob("*.py")
        if path.is_file() and without.isdisjoint(path.relative_to(root).parts)
    )


def generate(
    reader: Callable[..., Iterator[Row]], cache_dir: Path, on_error: str, **arguments: Any
) -> Dataset:
    """Reads documents into the cache of `datasets`, or finds them there.

    Args:
        reader: Yields rows, as in `lctrain.data.readers`.
        cache_dir: Cache folder of the data module.
        on_error: One of ON_ERROR.
        **arguments: Arguments of the reader.

    Raises:
        ValueError: the error that the reader raises; with on_error="raise", the first fault.
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
