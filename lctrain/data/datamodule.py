"""PackedDataModule: documents in, packed batches out, resumable to the batch."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from lctrain.batch import PackedBatch
from lctrain.config import DataSettings
from lctrain.data.documents import TokenizedDocument
from lctrain.data.given import DatasetSource, TokenPreparation, holds_texts
from lctrain.data.loader import Cursor, PackLoader, RowStream
from lctrain.data.order import epoch_order, imbalance
from lctrain.data.packing import PackingReport, document_limit
from lctrain.data.prepare import (
    Preparation,
    PreparedData,
    check_same_settings,
    fingerprint_settings,
)
from lctrain.data.sources import Source, StdlibSource
from lctrain.data.streaming import ENDLESS, StepNumbers, StreamedRows, StreamRecipe
from lctrain.limits import check_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from lctrain.config import DataOptions


class PackedDataModule(LightningDataModule):
    """Loads, splits, tokenizes and packs documents, and feeds them to every rank."""

    def __init__(
        self,
        source: Any = None,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        *,
        pin_memory: bool | None = None,
        held_out: Any = None,
        **settings: Unpack[DataOptions],
    ) -> None:
        """Checks the settings; nothing is read before `prepare_data` or `setup`.

        Args:
            source: A Source that says where documents come from; or a dataset of your own, a
                `datasets.Dataset` or a list: of texts (column "text"), of token ids (as in
                `lctrain.data.pack`) or rows that `lctrain.data.pack` returned. Default: the Python
                standard library.
            tokenizer: Name or path of a tokenizer of transformers, or one; None trains a byte-level
                BPE on the training split, once.
            pin_memory: Copy batches to pinned memory; default: if there is a GPU.
            held_out: Documents to hold out, of the same type as `source`; not allowed with a
                Source.
            **settings: The fields of `lctrain.config.DataSettings`, such as max_tokens.

        Raises:
            TypeError: if a setting does not exist.
            ValueError: if a setting is out of range.
        """
        super().__init__()
        _check_names(settings)
        self.options = DataSettings(**settings)
        check_seed(self.options.seed)
        if held_out is not None and (source is None or isinstance(source, Source)):
            raise ValueError(
                "held_out must come with a dataset, got it with a Source. Set the source's own "
                "held-out files, or pass a dataset."
            )
        self.preparation: Preparation | TokenPreparation
        if source is None or isinstance(source, Source) or holds_texts(source):
            self.preparation = Preparation(
                source=_as_source(source, held_out), tokenizer=tokenizer, settings=self.options
            )
        else:
            self.preparation = TokenPreparation(
                dataset=source, held_out=held_out, tokenizer=tokenizer, settings=self.options
            )
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._prepared: PreparedData | None = None
        self._cursor = Cursor()
        self._restored_settings: dict[str, Any] = {}

    @property
    def max_tokens(self) -> int:
        """Tokens of a row."""
        return self.options.max_tokens

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, after `setup()`."""
        return self._ready.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the tokenizer, after `setup()`.

        Raises:
            ValueError: for token ids without a tokenizer.
        """
        if self.tokenizer is None or isinstance(self.tokenizer, (str, os.PathLike)):
            raise ValueError(
                "tokenizer must be given to know vocab_size for token ids, got "
                f"{self.tokenizer!r}. Pass the tokenizer itself, or set the model's vocab_size."
            )
        return len(self.tokenizer)

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document, or piece of one, in the training rows."""
        if self._ready.stream is not None:  # any of those that are still to come
            return document_limit(self.options.max_document_tokens, self.max_tokens)
        return int(self._ready.train_rows.plan.lengths.max())

    @property
    def packing_report(self) -> PackingReport:
        """Counts of the training rows, after `setup()`."""
        return self._ready.train_rows.plan.report

    @property
    def held_out_report(self) -> PackingReport:
        """Counts of the held-out rows, after `setup()`."""
        return self._ready.held_out_rows.plan.report

    @property
    def imbalance(self) -> float:
        """Relative work lost by waiting ranks in the first epoch, after `setup()`."""
        costs = self._ready.train_rows.plan.costs()
        order = epoch_order(
            costs, self._world_size, self.options.seed, 0, self.options.balance_window
        )
        return imbalance(order, costs)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that determine the sequence of batches, after `setup()`.

        A resumed run compares them.
        """
        return self._ready.settings | {
            "seed": self.options.seed,
            "world_size": self._world_size,
            "balance_window": self.options.balance_window,
        }

    @property
    def fingerprint(self) -> str:
        """Hash of the training data and of what decides its rows, after `setup()`."""
        return fingerprint_settings(self._ready.settings)

    def prepare_data(self) -> None:
        """Fills the cache, in one process of a node."""
        self.preparation.run()

    def setup(self, stage: str | None = None) -> None:
        """Reads the cache and packs, in every process.

        Raises:
            ValueError: if the data cannot be read, holds no text, or fills no row.
        """
        if self._prepared is None:
            self._prepared = self.preparation.run()
            if self._restored_settings:
                check_same_settings(self.settings, self._restored_settings)

    def train_dataloader(self) -> PackLoader:
        """The endless stream of this rank's training batches; `len` is the steps of an epoch.

        Where the source itself has no end, no run reaches that of an epoch.

        Outside of `Trainer.fit` an iterator goes on where the last one stopped.

        Raises:
            ValueError: if there are fewer rows than ranks.
        """
        if self._ready.stream is not None:
            return self._stream_loader(self._ready.stream)
        rows, world_size, rank, seed = (
            self._ready.train_rows,
            self._world_size,
            self._rank,
            self.options.seed,
        )
        steps = len(rows) // world_size
        if steps == 0:
            raise ValueError(
                f"data must fill at least one row for each of {world_size} ranks, got {len(rows)} "
                "rows. Use more data, fewer ranks, or a smaller max_tokens."
            )
        costs, window = rows.plan.costs(), self.options.balance_window

        def epoch_rows(epoch: int) -> np.ndarray:
            return epoch_order(costs, world_size, seed, epoch, window)[:, rank]

        return PackLoader(
            rows,
            RowStream(epoch_rows, steps, endless=True),
            steps,
            self._position,
            self._cursor,
            num_workers=self.options.num_workers,
            pin_memory=self.pin_memory,
        )

    def _stream_loader(self, recipe: StreamRecipe) -> PackLoader:
        """This rank's batches of a source without an end."""
        return PackLoader(
            StreamedRows(recipe, self._rank, self._world_size),
            StepNumbers(),
            ENDLESS,
            self._position,
            self._cursor,
            num_workers=min(1, self.options.num_workers),  # each one would read the whole stream
            pin_memory=self.pin_memory,
        )

    def val_dataloader(self) -> PackLoader | list[Any]:
        """Held-out rows in their order; every rank has the same number of steps.

        A rank without a row of its own in the last step repeats one without targets, so that sums
        over tokens stay exact. Without held-out documents it is an empty list.
        """
        rows, world_size, rank = self._ready.held_out_rows, self._world_size, self._rank
        if len(rows) == 0:
            return []
        steps = -(-len(rows) // world_size)
        numbers = np.arange(steps) * world_size + rank
        numbers = np.where(numbers < len(rows), numbers, ~0)
        return PackLoader(
            rows,
            RowStream(lambda epoch: numbers, steps, endless=False),
            steps,
            lambda: 0,
            num_workers=self.options.num_workers,
            pin_memory=self.pin_memory,
        )

    def held_out_documents(self) -> list[TokenizedDocument]:
        """The held-out documents, not cut."""
        store = self._ready.held_out_rows.store
        return [
            TokenizedDocument(store.names[i], store.tokens(i).astype(np.int64), i)
            for i in range(len(store))
        ]

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> PackedBatch:
        """Moves a batch without waiting for the copy, which pinned memory allows."""
        if isinstance(batch, PackedBatch):
            check_vocabulary(batch, getattr(self.trainer, "lightning_module", None))
            return batch.to(device, non_blocking=self.pin_memory)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def test_dataloader(self) -> PackLoader | list[Any]:
        """The held-out rows, as in validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> PackLoader | list[Any]:
        """The held-out rows, as in validation."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Settings, and the number of batches that training on each rank has finished."""
        if self._prepared is None:
            return {}
        return {"settings": self.settings, "batches": self._finished_batches()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues after the batches of a checkpoint.

        Raises:
            ValueError: if this run's data or packing settings differ; the message names them.
        """
        if self.trainer is not None and self._progress is None:
            return  # a model may be validated on any data
        self._cursor.batches = state_dict["batches"]
        self._restored_settings = state_dict["settings"]
        if self._prepared is not None:
            check_same_settings(self.settings, self._restored_settings)

    @property
    def _ready(self) -> PreparedData:
        if self._prepared is None:
            raise RuntimeError("setup() must run first: nothing is read before it. Call it.")
        return self._prepared

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _progress(self) -> Any:
        """Lightning's own counts of training batches inside `Trainer.fit`, else None."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return None
        return self.trainer.fit_loop.epoch_loop.batch_progress

    def _position(self) -> int:
        """The batch that a new iterator starts with."""
        if self._progress is not None and getattr(self.trainer, "overfit_batches", 0) > 0:
            return self._progress.current.processed  # the same batches in every epoch
        return self._finished_batches()

    def _finished_batches(self) -> int:
        """Batches that training has finished.

        Inside `Trainer.fit` that is Lightning's own count, which it saves and restores with every
        checkpoint. It is asked when the first batch is fetched, not when the loader is made:
        `estimated_stepping_batches` makes the loader before Lightning has restored its counts.
        """
        if self._progress is not None:
            return self._progress.total.processed
        return self._cursor.batches


# At run time LightningCLI reads types, defaults and help from DataSettings, not from a TypedDict.
PackedDataModule.__init__.__annotations__["settings"] = "Any"


def _check_names(settings: Mapping[str, Any]) -> None:
    """Raises TypeError for a setting that does not exist."""
    known = [field.name for field in fields(DataSettings)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"Did you mean {near[0]}?" if near else "Leave it out."
            raise TypeError(f"settings must be among {', '.join(known)}, got {name}. {remedy}")


def _as_source(source: Any, held_out: Any) -> Source:
    if source is None:
        return StdlibSource()
    return (
        source if isinstance(source, Source) else DatasetSource(dataset=source, held_out=held_out)
    )


def check_vocabulary(batch: PackedBatch, module: Any) -> None:
    """Raises ValueError for tokens without an embedding: on a GPU they would end the process.

    Args:
        batch: A batch on the CPU; a batch on a device is not checked.
        module: The LightningModule, whose `model` is a transformers model if it has one.

    Raises:
        ValueError: if a token is outside of the vocabulary.
    """
    find = getattr(getattr(module, "model", None), "get_input_embeddings", None)
    if find is None or batch.input_ids.device.type != "cpu":
        return
    known, largest = getattr(find(), "num_embeddings", None), int(batch.input_ids.max())
    if known is not None and largest >= known:
        raise ValueError(
            f"documents must hold tokens below the model's vocabulary of {known}, got {largest}. "
            "Tokenize them with the model's own tokenizer (data.tokenizer)."
        )
