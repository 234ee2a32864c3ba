"""HubSource: documents from a dataset of the Hugging Face hub, or from a dataset's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.data.columns import text_column
from lctrain.data.faults import report_faults
from lctrain.data.fields import FieldError, decode, find_field, missing_column
from lctrain.data.hub_errors import dataset_errors
from lctrain.data.limits import head
from lctrain.data.readers import Row, fault, is_saved_dataset
from lctrain.data.sources import Source, generate

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class HubSource(Source):
    """Source of the documents in a dataset of the Hugging Face hub, or in a local folder.

    Attributes:
        dataset: Name on the hub, a folder that `load_dataset` can read, or a folder that
            `save_to_disk` wrote.
        config: Configuration (subset) of the dataset, if it has several.
        split: Split to train on. Slices such as "train[:1%]" work without streaming.
        held_out_split: Split to hold out. None holds out a part of `split`.
        field: Name of the column that holds the text; `doc.text` for a field in a nested record.
        revision: Git revision of the dataset.
        streaming: Whether to read records over the network as they are needed, instead of
            downloading the dataset. With `max_documents` or `max_bytes`, the records up to the
            limit are read before training and cached. Without these limits, training reads,
            tokenizes and packs one window of text after another, and starts again after the last
            record. Only the first window is cached. A resumed run skips the records that it has
            read.
        window_bytes: UTF-8 bytes of text in a window of an unlimited stream. Documents are packed
            and shuffled within a window. The tokenizer, if it is trained, and the held-out
            documents come from the first window.
    """

    dataset: str = ""
    config: str | None = None
    split: str = "train"
    held_out_split: str | None = None
    field: str = "text"
    revision: str | None = None
    streaming: bool = False
    window_bytes: int = 2**26

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dataset:
            raise ValueError("dataset must be a name on the hub, got ''. Set data.dataset.")
        object.__setattr__(self, "dataset", os.path.expanduser(self.dataset))
        if self.window_bytes < 1:
            raise ValueError(
                f"window_bytes must be at least 1, got {self.window_bytes}. The default is 64 MiB."
            )

    @property
    def endless(self) -> bool:
        """Whether training reads the documents as an endless stream, a window at a time."""
        limited = self.max_documents is not None or self.max_bytes is not None
        return self.streaming and not limited and not is_saved_dataset(Path(self.dataset))

    def load(self, cache_dir: Path) -> Dataset:
        """Returns the documents of `split`: see Source.

        Raises:
            ValueError: if the dataset lacks the column, or holds no text; with on_error="raise", if
                a document cannot be read.
        """
        return self._read(self.split, cache_dir)

    def load_held_out(self, cache_dir: Path) -> Dataset | None:
        """Returns the documents of `held_out_split` up to the limits, or None: see Source."""
        return self._read(self.held_out_split, cache_dir) if self.held_out_split else None

    def read_from(self, skip: int) -> Iterator[Row]:
        """Returns an iterator over the documents of the training split, read from the stream.

        Args:
            skip: Number of records to skip at the beginning.
        """
        return _read_stream(self._where(self.split), self.field, None, None, skip)

    def _where(self, split: str) -> dict[str, Any]:
        return {
            "path": self.dataset,
            "name": self.config,
            "split": split,
            "revision": self.revision,
        }

    def _read(self, split: str, cache_dir: Path) -> Dataset:
        where = self._where(split)
        if self.streaming and not is_saved_dataset(Path(self.dataset)):
            streamed = generate(
                _read_stream,
                cache_dir,
                self.on_error,
                where=where,
                field=self.field,
                max_documents=self.max_documents,
                max_bytes=self.window_bytes if self.endless else self.max_bytes,
            )
            return report_faults(streamed, self.on_error)
        dataset = load_split(where, cache_dir)
        texts = text_column(dataset, self.field, self.dataset)
        texts = head(texts, self.max_documents, self.max_bytes)
        return report_faults(texts, self.on_error)


def load_split(where: dict[str, Any], cache_dir: Path) -> Dataset:
    """Loads a split from the hub, or from a folder that `save_to_disk` wrote.

    Args:
        where: Arguments of `load_dataset`: path, name, split and revision.
        cache_dir: Cache folder of the data module.

    Raises:
        ValueError: if the split cannot be loaded.
    """
    from datasets import load_dataset

    if is_saved_dataset(Path(where["path"])):
        return _load_saved(where["path"], where["split"])
    with dataset_errors(where["path"]):
        return load_dataset(**where, cache_dir=str(cache_dir / "datasets"))


def _load_saved(folder: str, split: str) -> Dataset:
    """Loads a split from a folder of `save_to_disk`, which holds a Dataset or a DatasetDict."""
    from datasets import DatasetDict, ReadInstruction, load_from_disk

    with dataset_errors(folder):
        saved = load_from_disk(folder)
    name, bracket, _ = split.partition("[")
    if isinstance(saved, DatasetDict):
        if name not in saved:
            raise ValueError(
                f"split must be one of {sorted(saved)}, the splits in {folder}, got {name!r}. Set "
                "data.split."
            )
        saved = saved[name]
    elif name != "train" and str(saved.split) != name:
        raise ValueError(
            f"split must be train for {folder}, which holds one dataset without splits, got "
            f"{name!r}. Leave data.split and data.held_out_split out."
        )
    if not bracket:
        return saved
    with dataset_errors(folder):
        (part,) = ReadInstruction.from_spec(split).to_absolute({name: len(saved)})
    return saved.select(range(part.from_, part.to))


def _read_stream(
    where: dict[str, Any],
    field: str,
    max_documents: int | None,
    max_bytes: int | None,
    skip: int = 0,
) -> Iterator[Row]:
    """Yields the documents of a hub dataset after the first `skip`, up to either limit.

    A single document is yielded even if it is larger than `max_bytes`.
    """
    size = 0
    for number, record in enumerate(_records(where, skip), skip):
        name = f"{where['path']}:{number}"
        try:
            text = decode(find_field(record, field), field)
        except FieldError as error:
            if number == 0 and field.split(".")[0] not in record:
                raise missing_column(field, list(record)) from error
            yield fault(name, f"{name}: {error}")
            continue
        size += len((text or "").encode("utf-8"))
        too_large = max_bytes is not None and size > max_bytes and number > 0
        if too_large or (max_documents is not None and number >= max_documents):
            return
        yield {"text": text, "name": name, "fault": None}


def _records(where: dict[str, Any], skip: int) -> Iterator[dict[str, Any]]:
    """Yields the records of a hub dataset after the first `skip`."""
    from datasets import load_dataset

    with dataset_errors(where["path"]):
        records = load_dataset(**where, streaming=True)
        yield from records.skip(skip) if skip else records
