"""StreamedRows: training rows from a hub stream without end, read and packed a window at a time.

A window is the stream's next `window_bytes` of text. Its documents are tokenized, packed and
shuffled together. Memory holds one window, and the disk only counts per window (the journal). Every
rank reads the whole stream and takes its share of each window's rows, so no rank waits for data of
another one.
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
from lctrain.pluralize import pluralize
from lctrain_kernels.strict_json import to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ENDLESS = 2**40
"""Steps of an epoch of a stream: more than any run takes."""
MOST_DOCUMENTS = 2**31  # number of different document ids, which key the dropout masks


@dataclass(frozen=True)
class HeldOut:
    """Decides which texts of a stream are held out, by their hash as `Documents.split` does.

    Call it with the hash of a text, an unsigned 64-bit integer. The result is True if the text is
    held out.

    Attributes:
        fraction: Fraction of the documents to hold out.
        digests: Hashes of texts that are held out whatever the fraction: those held out of the
            first window.
    """

    fraction: float
    digests: frozenset[int]

    def __call__(self, digest: int) -> bool:
        return digest < math.ldexp(self.fraction, 64) or digest in self.digests


@dataclass(frozen=True, kw_only=True)
class StreamRecipe:
    """What determines the rows of an endless stream.

    Attributes:
        source: Source of the documents, with `endless` true.
        held_out: Function from the hash of a text to whether the text is held out.
        tokenizer: A transformers tokenizer.
        settings: Settings of packing, order and special tokens.
        journal: File with the counts of the windows that earlier runs have read.
    """

    source: HubSource
    held_out: Callable[[int], bool]
    tokenizer: PreTrainedTokenizerBase
    settings: DataSettings
    journal: Path


@dataclass(frozen=True)
class Window:
    """Position and counts of one window of a stream.

    Attributes:
        epoch: Number of times that the stream had been read to its end before this window.
        records: Number of records of this epoch before the window.
        pieces: Number of pieces of documents before the window, in all epochs. Document ids
            continue from this number.
        rows: Number of rows of the window.
        next_records: Number of records of this epoch up to the window's end; None if the stream
            ends there.
        next_pieces: Number of pieces up to the window's end, in all epochs.
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
    """Map-style dataset: item n is the pack of one rank at step n since training began.

    An item is a PlacedBatch: the pack, and its position in the stream (the number of its window,
    and the fields of `Window`). Items must be requested in rising order.

    A run that starts at a later step skips the windows before that step. Their counts come from the
    journal, so the skipped records are not tokenized. Without a journal, as on another machine,
    they are tokenized again, with the same result. A resumed run reads the window of its checkpoint
    again, and raises an error if the window's texts have changed. Another run may have rewritten
    the journal, so the journal is used only if it has the checkpoint's window.
    """

    def __init__(
        self, recipe: StreamRecipe, rank: int, world_size: int, cursor: Cursor | None = None
    ) -> None:
        """Stores the arguments; the first request of an item opens the stream.

        Args:
            recipe: What determines the rows.
            rank: This rank.
            world_size: Number of ranks.
            cursor: Position of the checkpoint from which the run resumes; None for a new run.
        """
        self.recipe = recipe
        self._cursor = Cursor() if cursor is None else cursor
        self._place: tuple[int, Window] | None = None  # position of the checkpoint's last pack
        self._rank, self._world_size = rank, world_size
        self._windows: list[Window] = []  # windows read so far, or known from the journal
        self._resumes = False
        self._reset()

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> PlacedBatch:
        """Returns the pack of a step, and its position in the stream.

        Raises:
            ValueError: if no window of the stream fills a row for every rank, or the texts differ
                from those that a resumed run was trained on.
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
        """Skips windows that end before step `number`, then reads and packs the next one."""
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
                break  # `_pack` compares this window with the checkpoint
            steps = self._windows[self._at].rows // self._world_size
            if number < self._first_step + steps:
                break
            self._first_step += steps
            self._at += 1
            self._records = None
        begin = self._begin(self._at)
        if self._records is None or begin.records == 0:  # a new epoch of the stream begins
            self._records = self.recipe.source.read_from(begin.records)
        self._pack(begin)

    def _begin(self, index: int) -> Window:
        """Returns window number `index`, whose predecessors are known.

        If the window was read before, its contents are known. Otherwise only its position is set.
        """
        if index < len(self._windows):
            return self._windows[index]
        if index == 0:
            return Window(0, 0, 0, 0, None, 0, "")
        last = self._windows[index - 1]
        if last.next_records is None:
            recent = [w for w in self._windows[:index] if w.epoch == last.epoch]
            if not any(window.rows >= self._world_size for window in recent):
                raise ValueError(
                    "data must fill at least one row for each of "
                    f"{pluralize(self._world_size, 'rank')} in a "
                    f"window of the stream, got {pluralize(last.rows, 'row')}. Raise "
                    "data.window_bytes, or "
                    "lower data.max_tokens."
                )
            return Window(last.epoch + 1, 0, last.next_pieces, 0, None, 0, "")
        return Window(last.epoch, last.next_records, last.next_pieces, 0, None, 0, "")

    def _pack(self, begin: Window) -> None:
        """Reads, tokenizes and packs one window, and compares it with earlier runs."""
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
    """Sampler of StreamedRows: yields the steps `start`, `start` + 1, ... without end."""

    def __init__(self) -> None:
        """Sets the first step to 0."""
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)

    def epoch_of(self, number: int) -> int:
        """Returns 0: a stream has one epoch."""
        return 0


def _take(
    records: Iterator[Row], recipe: StreamRecipe, before: str
) -> tuple[Documents, int, bool, str]:
    """Reads the next window of a stream.

    Args:
        records: Iterator over the stream's records, at the window's first record.
        recipe: What determines the rows.
        before: Hash of the texts of all earlier windows.

    Returns:
        The window's documents that are not held out; the number of records read; whether the stream
        has ended; the hash of all texts up to the window's end.
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
    """Returns the windows that earlier runs have counted; [] without a readable journal."""
    try:
        return [Window(*fields) for fields in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return []


def _write_journal(path: Path, windows: list[Window]) -> None:
    """Replaces the journal atomically.

    An error of the disk is only logged: without a journal, a resume takes longer.
    """
    rows: list[list[Any]] = [list(vars(window).values()) for window in windows]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder) / path.name
            written.write_text(to_json(rows))
            os.replace(written, path)
    except OSError as error:
        log.warning("The counts of the stream could not be written to %s: %s", path, error.strerror)
