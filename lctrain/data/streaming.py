"""Training rows of a stream that has no end: read, tokenized and packed a window at a time.

Nothing of the stream is written to disk but the counts of its windows, and memory holds one window.
Documents are packed and shuffled within their window. Every rank reads the whole stream and takes
its share of the rows of a window, so that the ranks never wait for each other's documents.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.utils.data import Sampler

from lctrain.batch import PackedBatch
from lctrain.config import DataSettings
from lctrain.data.collator import PackedRows
from lctrain.data.documents import Documents
from lctrain.data.fields import BYTE_ORDER_MARK
from lctrain.data.hub import HubSource
from lctrain.data.loader import Cursor, PlacedBatch
from lctrain.data.order import epoch_order
from lctrain.data.packing import Overlong, plan_rows
from lctrain.data.readers import Row
from lctrain.data.tokenizing import tokenize_window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ENDLESS = 2**40
"""Steps of an epoch of a stream: more than any run takes."""
MOST_DOCUMENTS = 2**31  # that a dropout key tells apart


@dataclass(frozen=True)
class HeldOut:
    """Tells which texts of a stream are held out: as `Documents.split` does, by their hash.

    Attributes:
        fraction: Share of the documents.
        digests: Hashes of further ones, those that the first part of the stream held out.
    """

    fraction: float
    digests: frozenset[int]

    def __call__(self, digest: int) -> bool:
        return digest < math.ldexp(self.fraction, 64) or digest in self.digests


@dataclass(frozen=True, kw_only=True)
class StreamRecipe:
    """How a stream becomes rows.

    Attributes:
        source: Without an end.
        held_out: Whether the text of this digest is held out.
        tokenizer: The tokenizer of transformers.
        settings: Settings of the rows.
        journal: File that keeps the counts of the windows.
    """

    source: HubSource
    held_out: Callable[[int], bool]
    tokenizer: PreTrainedTokenizerBase
    settings: DataSettings
    journal: Path


@dataclass(frozen=True)
class Window:
    """A part of the stream.

    Attributes:
        epoch: Times that the stream was read to its end before.
        records: Records of this epoch before the window.
        pieces: Pieces of documents before the window, over all epochs; numbers the documents.
        rows: Rows of the window.
        next_records: Records of this epoch up to the end of the window; None if the stream ends.
        next_pieces: Pieces up to the end of the window.
        digest: Hash of the texts of all windows up to the end of this one.
    """

    epoch: int
    records: int
    pieces: int
    rows: int
    next_records: int | None
    next_pieces: int
    digest: str


class StreamedRows(torch.utils.data.Dataset[PlacedBatch]):
    """The pack of every step of one rank, by the number of the step since training began.

    Each pack comes with its place: the number of its window, and the fields of `Window`. A resumed
    run reads the window of the checkpoint's place again and compares it with the checkpoint. Other
    runs may have rewritten the journal, so it is used only if it has that window.

    Steps must be requested in rising order. A run that starts at a later step reads the counts of
    earlier windows from the journal, and skips their records without tokenizing them. Without a
    journal (on another machine) it tokenizes them again, with the same result.
    """

    def __init__(
        self, recipe: StreamRecipe, rank: int, world_size: int, cursor: Cursor | None = None
    ) -> None:
        """Stores the arguments; the stream is opened by the first request.

        Args:
            recipe: How the stream becomes rows.
            rank: This rank.
            world_size: Number of ranks.
            cursor: Place of the checkpoint from which the run resumes; None for a new run.
        """
        self.recipe = recipe
        self._cursor = Cursor() if cursor is None else cursor
        self._place: tuple[int, Window] | None = None  # of the step before the first one
        self._rank, self._world_size = rank, world_size
        self._windows: list[Window] = []  # the known ones
        self._resumes = False
        self._reset()

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> PlacedBatch:
        """Returns the pack of a step, and its place.

        Raises:
            ValueError: if the stream ends without having filled a row for every rank, or is not the
                one that a resumed run was trained on.
        """
        if number < self._first_step:
            self._reset()
        while number >= self._first_step + len(self._order):
            self._first_step += len(self._order)
            self._advance(number)
        batch = self._batch(int(self._order[number - self._first_step]))
        return PlacedBatch(batch, {"number": self._at} | vars(self._windows[self._at]))

    def _reset(self) -> None:
        self._at = -1  # index of the window
        self._first_step = 0
        self._order = np.array([], dtype=np.int64)
        self._rows: PackedRows | None = None
        self._records: Iterator[Row] | None = None

    def _batch(self, row: int) -> PackedBatch:
        assert self._rows is not None
        batch = self._rows[row]
        first = self._windows[self._at].pieces
        return replace(batch, document_ids=(batch.document_ids + first) % MOST_DOCUMENTS)

    def _advance(self, number: int) -> None:
        """Skips windows that are known to end before a step."""
        if not self._windows:
            self._resumes = number > 0
            self._windows = _read_journal(self.recipe.journal)
            if place := self._cursor.place_before(number):
                fields = dict(place)
                self._place = fields.pop("number"), Window(**fields)
                at, window = self._place
                if self._windows[at : at + 1] != [window]:
                    self._windows = []
        self._at += 1
        while self._at < len(self._windows):
            if self._place is not None and self._at == self._place[0]:
                break  # to compare it
            steps = self._windows[self._at].rows // self._world_size
            if number < self._first_step + steps:
                break
            self._first_step += steps
            self._at += 1
            self._records = None
        begin = self._begin(self._at)
        if self._records is None or begin.records == 0:  # an epoch begins
            self._records = self.recipe.source.read_from(begin.records)
        self._pack(begin)

    def _begin(self, index: int) -> Window:
        """Starts a window, whose position follows from the windows before it."""
        if index < len(self._windows):
            return self._windows[index]
        if index == 0:
            return Window(0, 0, 0, 0, None, 0, "")
        last = self._windows[index - 1]
        if last.next_records is None:
            recent = [w for w in self._windows[:index] if w.epoch == last.epoch]
            if not any(window.rows >= self._world_size for window in recent):
                raise ValueError(
                    f"data must fill at least one row for each of {self._world_size} ranks in a "
                    f"window of the stream, got {last.rows} rows. Raise data.window_bytes, or "
                    "lower data.max_tokens."
                )
            return Window(last.epoch + 1, 0, last.next_pieces, 0, None, 0, "")
        return Window(last.epoch, last.next_records, last.next_pieces, 0, None, 0, "")

    def _pack(self, begin: Window) -> None:
        """Reads, tokenizes and packs one window."""
        recipe, settings = self.recipe, self.recipe.settings
        assert self._records is not None
        before = self._windows[self._at - 1].digest if self._at else ""
        documents, taken, ended, digest = _take(self._records, recipe, before)
        store = tokenize_window(documents, recipe.tokenizer, settings.special_tokens)
        plan = plan_rows(
            store.lengths,
            settings.max_tokens,
            max_document_tokens=settings.max_document_tokens,
            overlong=cast(Overlong, settings.overlong),
            window=settings.packing_window,
        )
        window = Window(
            begin.epoch,
            begin.records,
            begin.pieces,
            len(plan),
            None if ended else begin.records + taken,
            begin.pieces + len(plan.documents),
            digest,
        )
        if self._place is not None and self._at == self._place[0] and window != self._place[1]:
            raise self._other_stream(begin.records)
        if self._windows[self._at : self._at + 1] != [window]:
            if self._resumes and self._at < len(self._windows):
                raise self._other_stream(begin.records)
            self._windows[self._at :] = [window]
            if self._rank == 0:
                _write_journal(recipe.journal, self._windows)
        self._rows = PackedRows(store, plan)
        steps = len(plan) // self._world_size
        if steps == 0:
            self._order = np.array([], dtype=np.int64)
            return
        order = epoch_order(
            plan.costs(), self._world_size, settings.seed, self._at, settings.balance_window
        )
        self._order = order[:, self._rank]

    def _other_stream(self, record: int) -> ValueError:
        return ValueError(
            "a resumed run must read the stream that it was trained on, got another one from "
            f"record {record:,} on. Name a data.revision, or start a new run without ckpt_path."
        )


class StepNumbers(Sampler[int]):
    """0, 1, 2, ... from `start` on: what StreamedRows is asked for."""

    def __init__(self) -> None:
        """Starts at 0."""
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def _take(
    records: Iterator[Row], recipe: StreamRecipe, before: str
) -> tuple[Documents, int, bool, str]:
    """Reads a window.

    Args:
        records: The stream from the window on.
        recipe: How the stream becomes rows.
        before: Hash of the windows before.

    Returns:
        Its documents without those held out, the records read, whether the stream has ended, and
        the hash of the windows up to its end.
    """
    from datasets import Dataset, Features, Value

    texts: list[str] = []
    names: list[str] = []
    digests: list[int] = []
    sizes: list[int] = []
    faults: list[str] = []
    taken, size, ended = 0, 0, True
    content_hash = hashlib.blake2b(before.encode(), digest_size=16)
    for record in records:
        taken += 1
        if record["fault"] is not None:
            faults.append(record["fault"])
            if recipe.source.on_error == "raise" and record["text"] is None:
                raise ValueError(record["fault"])
        text = (record["text"] or "").removeprefix(BYTE_ORDER_MARK)
        content = text.encode("utf-8")
        size += len(content)
        short_hash = hashlib.blake2b(content, digest_size=8).digest()
        content_hash.update(short_hash)
        digest = int.from_bytes(short_hash, "little")
        if text.strip() and not recipe.held_out(digest):
            texts.append(text)
            names.append(record["name"] or "")
            digests.append(digest)
            sizes.append(len(content))
        if size >= recipe.source.window_bytes:
            ended = False
            break
    if faults:
        log.warning(
            "%d of %d records of the stream could not be read, or in part: %s",
            len(faults),
            taken,
            faults[0],
        )
    features = Features({"text": Value("large_string"), "name": Value("string")})
    dataset = Dataset.from_dict({"text": texts, "name": names}, features)
    found = Documents(
        dataset, names, np.array(digests, dtype=np.uint64), np.array(sizes, dtype=np.int64)
    )
    return found, taken, ended, content_hash.hexdigest()


def _read_journal(path: Path) -> list[Window]:
    """The windows that earlier runs counted; none if there is no journal that can be read."""
    try:
        return [Window(*fields) for fields in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return []


def _write_journal(path: Path, windows: list[Window]) -> None:
    """Writes the counts at once; a disk that refuses them costs a later resume time only."""
    rows: list[list[Any]] = [list(vars(window).values()) for window in windows]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder) / path.name
            written.write_text(json.dumps(rows))
            os.replace(written, path)
    except OSError as error:
        log.warning("The counts of the stream could not be written to %s: %s", path, error.strerror)
