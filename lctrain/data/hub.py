"""Documents from a dataset of the Hugging Face hub, or a folder that `load_dataset` understands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.data.limits import head
from lctrain.data.sources import Source, generate, missing_column, text_column

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class HubSource(Source):
    """A dataset of the hub.

    Attributes:
        dataset: Name on the hub, or a local folder.
        config: Configuration (subset) of the dataset, if it has several.
        split: Split to train on; slices such as "train[:1%]" work without streaming.
        held_out_split: Split to hold out; None: some documents of `split` are held out.
        field: The column that holds the text.
        revision: Git revision of the dataset.
        streaming: Read only the first `max_documents` (or `max_bytes`) over the network, without
            downloading the rest. What was read is cached, so that a resumed run sees the same.
    """

    dataset: str = ""
    config: str | None = None
    split: str = "train"
    held_out_split: str | None = None
    field: str = "text"
    revision: str | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dataset:
            raise ValueError("dataset must be a name on the hub, got ''. Set data.dataset.")
        if self.streaming and self.max_documents is None and self.max_bytes is None:
            raise ValueError(
                "streaming must have an end, got neither max_documents nor max_bytes. Set one, or "
                "streaming=false."
            )

    def load(self, cache_dir: Path) -> Dataset:
        """See Source. Raises ValueError if the column is missing."""
        return self._read(self.split, cache_dir)

    def load_held_out(self, cache_dir: Path) -> Dataset | None:
        """See Source; the limits apply to this split too."""
        return self._read(self.held_out_split, cache_dir) if self.held_out_split else None

    def _read(self, split: str, cache_dir: Path) -> Dataset:
        from datasets import load_dataset

        where = {
            "path": self.dataset,
            "name": self.config,
            "split": split,
            "revision": self.revision,
        }
        if not self.streaming:
            dataset = load_dataset(**where, cache_dir=str(cache_dir / "datasets"))
            return head(text_column(dataset, self.field), self.max_documents, self.max_bytes)
        return generate(
            _read_stream,
            cache_dir,
            where=where,
            field=self.field,
            max_documents=self.max_documents,
            max_bytes=self.max_bytes,
        )


def _read_stream(
    where: dict[str, Any], field: str, max_documents: int | None, max_bytes: int | None
) -> Iterator[dict[str, str]]:
    """The first documents of a hub dataset, up to either limit, at least one."""
    from datasets import load_dataset

    size = 0
    for number, record in enumerate(load_dataset(**where, streaming=True)):
        if field not in record:
            raise missing_column(field, list(record))
        text = record[field] or ""
        size += len(text.encode("utf-8"))
        too_large = max_bytes is not None and size > max_bytes and number > 0
        if too_large or (max_documents is not None and number >= max_documents):
            return
        yield {"text": text, "name": f"{where['path']}:{number}"}
