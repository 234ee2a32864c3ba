"""PackedDataModule: the LightningDataModule that turns documents into packed batches.

A resumed run continues with the batch after the last one that training finished.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from lctrain.batch import PackedBatch
from lctrain.config import DataSettings
from lctrain.data.choose import preparation_of
from lctrain.data.collator import PackedRows
from lctrain.data.documents import TokenizedDocument
from lctrain.data.given import TokenPreparation
from lctrain.data.length_stages import refuse_stages, training_stream
from lctrain.data.loader import Cursor, PackLoader, RowStream
from lctrain.data.masking import MaskTokens
from lctrain.data.order import imbalance
from lctrain.data.own_tokenizer import require_own_tokenizer, warn_of_other_ids
from lctrain.data.packing import PackingReport, combine_reports, document_limit
from lctrain.data.prepared import PreparedData, check_same_settings, fingerprint_settings
from lctrain.data.restored import restored_settings
from lctrain.data.run_view import RunView
from lctrain.data.setting_names import check_names
from lctrain.data.streaming import ENDLESS, StepNumbers, StreamedRows, StreamRecipe
from lctrain.data.training_order import TrainingOrder
from lctrain.data.vocabulary import check_vocabulary
from lctrain.distributed import Topology
from lctrain.limits import check_seed, check_shared_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from lctrain.config import DataOptions


class PackedDataModule(LightningDataModule):
    """LightningDataModule that loads, splits, tokenizes and packs documents for every rank."""

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
            source: Documents to train on, in one of five forms: a Source, which reads files or a
                dataset of the hub; a SourceMix, which mixes several; texts, as a list or a
                `datasets.Dataset` with the column "text"; documents of token ids, as in
                `lctrain.data.pack`; or the rows that `lctrain.data.pack` returned. None reads the
                Python standard library.
            tokenizer: A tokenizer of transformers, or its name or path. None trains a byte-level
                BPE on the training split and keeps it in the cache; a pretrained model needs the
                tokenizer that it was trained with.
            pin_memory: Whether to copy batches to pinned memory. None does so if there is a GPU.
            held_out: Documents to hold out, in the same form as `source`; not allowed with a
                Source. Or a mapping of further held-out sets by name, each a Source, or documents
                in the same form as `source`.
            **settings: Fields of `lctrain.config.DataSettings`, such as max_tokens.

        Raises:
            TypeError: if a setting does not exist.
            ValueError: if a setting is out of range.
        """
        super().__init__()
        check_names(settings)
        self.options = DataSettings(**settings)
        check_seed(self.options.seed)
        self.preparation = preparation_of(source, tokenizer, self.options, held_out)
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._prepared: PreparedData | None = None
        self._cursor = Cursor()
        self._restored: tuple[dict[str, Any], int | None] | None = None

    @property
    def max_tokens(self) -> int:
        """Capacity of a row in tokens."""
        return self.options.max_tokens

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. It is available after `setup()`."""
        return self._ready.tokenizer

    @property
    def trains_tokenizer(self) -> bool:
        """Whether the data module trains a tokenizer of its own."""
        preparation = self.preparation
        return not isinstance(preparation, TokenPreparation) and preparation.tokenizer is None

    @property
    def vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary. It is available after `setup()`.

        Raises:
            ValueError: if the documents are token ids and no tokenizer object was given.
        """
        if self.tokenizer is None or isinstance(self.tokenizer, (str, os.PathLike)):
            raise ValueError(
                "tokenizer must be given to know vocab_size for token ids, got "
                f"{self.tokenizer!r}. Pass the tokenizer itself, or set the model's vocab_size."
            )
        return len(self.tokenizer)

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document, or piece of a document, in the training rows.

        For an endless stream it is the longest length that a document can have.
        """
        if self._ready.stream is not None:
            return document_limit(self.options.max_document_tokens, self.max_tokens)
        return int(self._ready.train_rows.plan.lengths.max())

    @property
    def packing_report(self) -> PackingReport:
        """Counts of the training rows. They are available after `setup()`."""
        return self._ready.train_rows.plan.report

    @property
    def held_out_report(self) -> PackingReport:
        """Counts of all held-out rows. They are available after `setup()`."""
        return combine_reports(list(self.held_out_reports.values()))

    @property
    def held_out_reports(self) -> dict[str, PackingReport]:
        """Counts of the rows of every held-out set, by name. They are available after `setup()`."""
        return {name: rows.report for name, rows in self._ready.held_out_rows.items()}

    @property
    def held_out_names(self) -> list[str]:
        """Names of the held-out sets that have rows, in the order of their loaders.

        They are available after `setup()`.
        """
        return [name for name, rows in self._ready.held_out_rows.items() if len(rows)]

    @property
    def imbalance(self) -> float:
        """Heaviest rank's attention work over the mean of all ranks, in the first epoch, >= 1.

        It is available after `setup()`.
        """
        return imbalance(self._order.rows(0), self._order.costs)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that determine the sequence of batches. They are available after `setup()`.

        A resumed run compares them with those of its checkpoint. Which rows belong to an optimizer
        step depends only on the step's number of packs, so a run may resume with another number of
        ranks if gradient accumulation makes up for it. The exceptions are an endless stream, and an
        epoch with fewer rows than a step has packs: their rows are assigned to ranks and
        micro-batches directly.
        """
        is_stream = self._ready.stream is not None
        size: dict[str, Any] = (
            {} if is_stream else {"packs_per_step": self._run.data_size * self._run.accumulated}
        )
        stages = self._run.stages
        if is_stream or stages is not None or not self._order.fills_a_step:
            size |= {"world_size": self._run.data_size, "accumulated": self._run.accumulated}
        if stages is not None:
            size["length_stages"] = dict(zip(stages.steps, stages.lengths, strict=True))
        return self._ready.settings | {
            "seed": self.options.seed,
            **size,
            "balance_window": self.options.balance_window,
        }

    @property
    def fingerprint(self) -> str:
        """Hash of the training texts and of the settings that determine the training rows.

        It is available after `setup()`.
        """
        return fingerprint_settings(self._ready.settings)

    def prepare_data(self) -> None:
        """Fills the cache. Lightning calls it in one process of a node.

        Raises:
            ValueError: as in `setup`.
        """
        self._check_trainer()
        self.preparation.run()

    def setup(self, stage: str | None = None) -> None:
        """Reads the cache and plans the rows. Lightning calls it in every process.

        Raises:
            ValueError: if the data cannot be read, holds no text, or fills no row; if a new
                tokenizer would be trained for a pretrained model; if ranks share masked packs; or
                a length of LengthSchedule does not divide the rows.
        """
        if self._prepared is None:
            self._check_trainer()
            self._prepared = self.preparation.run()
            module = getattr(self.trainer, "lightning_module", None)
            warn_of_other_ids(module, self._prepared.tokenizer)
            self._check_restored()

    def train_dataloader(self) -> PackLoader:
        """Returns the loader of this rank's training batches; `len` is the steps of an epoch.

        The batches never end: an iterator continues with the next epoch. Outside of `Trainer.fit`,
        a new iterator starts where the last one stopped. If the source is an endless stream, `len`
        is larger than any run is long.

        Raises:
            ValueError: if there are fewer rows than ranks, or LengthSchedule has an endless stream.
        """
        if self._ready.stream is not None:
            refuse_stages(self._run.stages)
            return self._stream_loader(self._ready.stream)
        rows, order = self._ready.train_rows, self._order
        if order.steps == 0:
            raise ValueError(
                f"data must fill at least one row for each rank, got {len(rows)} for "
                f"{order.ranks}. Use more data, fewer ranks, or a smaller max_tokens."
            )
        dataset, stream = training_stream(
            rows, order, self._run.data_rank, self._run.stages, self.max_tokens
        )
        return PackLoader(
            dataset,
            stream,
            order.steps,
            self._position,
            self._cursor,
            num_workers=self.options.num_workers,
            **self._batch_options(),
        )

    @property
    def _order(self) -> TrainingOrder:
        return TrainingOrder(
            self._ready.train_rows.plan.costs(),
            self._run.data_size,
            self._run.accumulated,
            self.options.seed,
            self.options.balance_window,
        )

    def _stream_loader(self, recipe: StreamRecipe) -> PackLoader:
        """Returns the loader of this rank's batches of an endless stream."""
        return PackLoader(
            StreamedRows(recipe, self._run.data_rank, self._run.data_size, self._cursor),
            StepNumbers(),
            ENDLESS,
            self._position,
            self._cursor,
            num_workers=min(1, self.options.num_workers),  # each one would read the whole stream
            **self._batch_options(),
        )

    def val_dataloader(self) -> PackLoader | list[Any]:
        """Returns the loader of this rank's held-out rows.

        With several held-out sets it returns a list of loaders; without any, an empty list.

        The rows keep their order, and every rank has the same number of steps. If no row is left
        for a rank in the last step, it reads the first row without targets, so that sums over
        tokens stay exact.
        """
        rows = self._ready.held_out_rows
        loaders = [self._held_out_loader(rows[name], name) for name in self.held_out_names]
        return loaders[0] if len(loaders) == 1 else loaders

    def _held_out_loader(self, rows: PackedRows, name: str) -> PackLoader:
        """Returns the loader of this rank's rows of one held-out set."""
        steps = -(-len(rows) // self._run.data_size)
        numbers = np.arange(steps) * self._run.data_size + self._run.data_rank
        numbers = np.where(numbers < len(rows), numbers, ~0)
        return PackLoader(
            rows,
            RowStream(lambda epoch: numbers, steps, endless=False),
            steps,
            lambda: 0,
            name=name,
            num_workers=self.options.num_workers,
            **self._batch_options(),
        )

    def _batch_options(self) -> dict[str, Any]:
        return {"pin_memory": self.pin_memory, "collate_fn": self._run.share, "mask": self.masking}

    @property
    def masking(self) -> MaskTokens | None:
        """The choice of masked tokens; None without mask_fraction. Available after `setup()`."""
        fraction = self.options.mask_fraction
        if fraction is None:
            return None
        return MaskTokens.of(self.tokenizer, fraction, self.options.seed)

    def held_out_documents(self) -> list[TokenizedDocument]:
        """Returns the whole held-out documents of all sets, before packing cuts them."""
        stores = [rows.store for rows in self._ready.held_out_rows.values()]
        places = [(store, index) for store in stores for index in range(len(store))]
        return [
            TokenizedDocument(store.names[index], store.tokens(index).astype(np.int64), number)
            for number, (store, index) in enumerate(places)
        ]

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> PackedBatch:
        """Moves a batch to a device. From pinned memory, the copy does not block."""
        if isinstance(batch, PackedBatch):
            check_vocabulary(batch, getattr(self.trainer, "lightning_module", None))
            return batch.to(device, non_blocking=self.pin_memory)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def test_dataloader(self) -> PackLoader | list[Any]:
        """Returns the loader of the held-out rows, as `val_dataloader` does."""
        return self.val_dataloader()

    def predict_dataloader(self) -> PackLoader | list[Any]:
        """Returns the loader of the held-out rows, as `val_dataloader` does."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Returns the settings, and the number of batches that training on each rank finished.

        For an endless stream the state also identifies the window of the last batch.
        """
        if self._prepared is None:
            return {}
        batches = self._finished_batches()
        state = {
            "settings": self.settings,
            "batches": batches,
            "accumulated": self._run.accumulated,
        }
        if place := self._cursor.place_before(batches):
            state["place"] = place
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets the next training batch to the one after the last batch of a checkpoint.

        Raises:
            ValueError: if this run's data or packing settings differ; the message names them. Or if
                another number of packs is accumulated and the module does not convert Lightning's
                counts.
        """
        if self.trainer is not None and self._run.progress is None:
            return  # a model may be validated on any data
        known = state_dict.get("accumulated")  # older checkpoints lack it
        then = self._run.accumulated if known is None else known
        module = getattr(self.trainer, "lightning_module", None)
        if then != self._run.accumulated and not getattr(module, "converts_progress", False):
            raise ValueError(
                f"accumulate_grad_batches must be {then}, as in the checkpoint, for a "
                f"{type(module).__name__}, got {self._run.accumulated}. Restore it, or train with "
                "LongContextModule."
            )
        self._cursor.batches = state_dict["batches"] // then * self._run.accumulated
        place = state_dict.get("place")  # older checkpoints lack it
        self._cursor.places = [] if place is None else [(0, place)]
        self._restored = state_dict["settings"], known
        self._check_restored()

    def _check_restored(self) -> None:
        """Raises a ValueError if the settings of the checkpoint are not those of this run."""
        if self._restored is not None and self._prepared is not None:
            is_stream = self._prepared.stream is not None
            then = restored_settings(*self._restored, self._run.accumulated, is_stream)
            check_same_settings(self.settings, then)

    def _check_trainer(self) -> None:
        """Raises ValueError for options that do not fit the trainer or its module."""
        if (stages := self._run.stages) is not None:
            stages.check_rows(self.max_tokens)
        if (fraction := self.options.mask_fraction) is not None:
            check_shared_task(Topology.of(self.trainer).context, f"mask_fraction={fraction}")
        if self.trains_tokenizer:
            require_own_tokenizer(getattr(self.trainer, "lightning_module", None))

    @property
    def _ready(self) -> PreparedData:
        if self._prepared is None:
            raise RuntimeError("setup() must run first: nothing is read before it. Call it.")
        return self._prepared

    @property
    def _run(self) -> RunView:
        return RunView(self.trainer)

    def _position(self) -> int:
        """Returns the number of the batch that a new iterator starts with."""
        if self._run.progress is not None and getattr(self.trainer, "overfit_batches", 0) > 0:
            return self._run.progress.current.processed  # the same batches in every epoch
        return self._finished_batches()

    def _finished_batches(self) -> int:
        """Returns the number of batches that training has finished.

        Inside `Trainer.fit` it is Lightning's own count, which Lightning saves and restores with
        every checkpoint. The count is read when the first batch is fetched, not when the loader is
        built: `estimated_stepping_batches` builds the loader before Lightning restores its counts.
        """
        if self._run.progress is not None:
            return self._run.progress.total.processed
        return self._cursor.batches


# At run time LightningCLI reads types, defaults and help from DataSettings, not from a TypedDict.
PackedDataModule.__init__.__annotations__["settings"] = "Any"
