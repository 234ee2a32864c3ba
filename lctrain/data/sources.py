"""Where documents come from. Every source loads a `datasets.Dataset` with a column "text".

A source is a frozen dataclass of plain values, so that Hydra can build it and errors can show it.
`load()` gives the documents that are split into train and held-out by content; `load_held_out()`
gives documents that the user set aside, or None.
"""

from __future__ import annotations

import abc
import sysconfig
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.data.limits import choose_by_hash, head
from lctrain.data.readers import describe_files, match_files, read_jsonl, read_text

if TYPE_CHECKING:
    from datasets import Dataset

_NO_SOURCES = frozenset({"__pycache__"})
NOT_STANDARD = _NO_SOURCES | {"site-packages", "dist-packages"}


@dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """What all sources share.

    Attributes:
        max_documents: Use at most this many documents; None for all.
        max_bytes: Use documents up to this much text, at least one; None for all.
    """

    max_documents: int | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_documents", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}. Use null for no limit.")

    @abc.abstractmethod
    def load(self, cache_dir: Path) -> Dataset:
        """Returns a dataset with columns "text" (None: not decodable) and perhaps "name"."""

    def load_held_out(self, cache_dir: Path) -> Dataset | None:
        """Returns documents set aside by the user, or None to split off some of `load()`."""
        return None


@dataclass(frozen=True, kw_only=True)
class StdlibSource(Source):
    """The Python files of the running interpreter's standard library, its tests included.

    With a limit, the files are chosen by a hash of their path, so that they stay a mixture.
    """

    def load(self, cache_dir: Path) -> Dataset:
        """See Source. Files that are not UTF-8 are skipped and counted."""
        root = standard_library()
        paths = python_files(root, without=NOT_STANDARD)
        if not paths:
            raise ValueError(
                f"the standard library must have .py files, got none under {root}. "
                "Use another data source, for example data=text."
            )
        files = describe_files(paths, [path.relative_to(root).as_posix() for path in paths])
        files = choose_by_hash(files, self.max_documents, self.max_bytes)
        return generate(read_text, cache_dir, files=files, skip_undecodable=True)


@dataclass(frozen=True, kw_only=True)
class FileSource(Source):
    """Files that the user names.

    Attributes:
        files: Files or globs (** crosses folders); each must match.
        held_out_files: The same, to hold out; empty: some documents of `files` are held out.
    """

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
        dataset = self._read(match_files(self.files), cache_dir)
        return head(dataset, self.max_documents, self.max_bytes)

    def load_held_out(self, cache_dir: Path) -> Dataset | None:
        """See Source."""
        if not self.held_out_files:
            return None
        return self._read(match_files(self.held_out_files), cache_dir)

    @abc.abstractmethod
    def _read(self, paths: list[Path], cache_dir: Path) -> Dataset:
        """Returns what the files hold."""


@dataclass(frozen=True, kw_only=True)
class TextSource(FileSource):
    """Text files in UTF-8, one document each; a file that is not is a ValueError."""

    def _read(self, paths: list[Path], cache_dir: Path) -> Dataset:
        files = describe_files(paths, [path.as_posix() for path in paths])
        return generate(read_text, cache_dir, files=files, skip_undecodable=False)


@dataclass(frozen=True, kw_only=True)
class JsonlSource(FileSource):
    """JSON objects, one a line; files ending in .gz are decompressed.

    A line that is not JSON or lacks the field is a ValueError with file and line number.

    Attributes:
        field: The field that holds the text.
    """

    field: str = "text"

    def _read(self, paths: list[Path], cache_dir: Path) -> Dataset:
        files = describe_files(paths, [path.as_posix() for path in paths])
        return generate(read_jsonl, cache_dir, files=files, field=self.field)


@dataclass(frozen=True, kw_only=True)
class ParquetSource(FileSource):
    """Parquet files, one document a row; a file without the column is a ValueError.

    Attributes:
        field: The column that holds the text.
    """

    field: str = "text"

    def _read(self, paths: list[Path], cache_dir: Path) -> Dataset:
        import pyarrow.parquet as pq
        from datasets import load_dataset

        for path in paths:  # from the schema, before anything is converted
            columns = pq.read_schema(path).names
            if self.field not in columns:
                raise missing_column(self.field, columns, f"{path}: ")
        dataset = load_dataset(
            "parquet",
            data_files=[str(path) for path in paths],
            split="train",
            columns=[self.field],
            cache_dir=str(cache_dir / "datasets"),
        )
        return text_column(dataset, self.field)


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


def generate(reader: Any, cache_dir: Path, **arguments: Any) -> Dataset:
    """Dataset.from_generator, with the reader's own ValueError in place of the wrapper's."""
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    try:
        return Dataset.from_generator(
            reader,
            features=Features({"text": Value("large_string"), "name": Value("string")}),
            gen_kwargs=arguments,
            cache_dir=str(cache_dir / "datasets"),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def text_column(dataset: Dataset, field: str) -> Dataset:
    """Returns only the column with the text, as "text"."""
    if field not in dataset.column_names:
        raise missing_column(field, dataset.column_names)
    feature = dataset.features[field]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"column {field!r} must hold strings, got {feature}. Set data.field to the column that "
            "holds the text."
        )
    dataset = dataset.select_columns([field])
    return dataset if field == "text" else dataset.rename_column(field, "text")


def missing_column(field: str, columns: Sequence[str], where: str = "") -> ValueError:
    """The error for data that lacks the text column."""
    return ValueError(
        f"{where}field must be a column of the data, got {field!r}; it has {sorted(columns)}. "
        "Set data.field to the column that holds the text."
    )
