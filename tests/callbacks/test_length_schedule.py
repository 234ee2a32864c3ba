"""Tests LengthSchedule: packs grow at given steps, and a resumed run reads the same parts."""

import dataclasses
import logging
import math
import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim.lr_scheduler import LambdaLR

from lctrain.batch import IGNORE_INDEX
from lctrain.callbacks import LengthSchedule, StepCheckpoint
from lctrain.config import OptimConfig
from lctrain.data import PackedDataModule
from lctrain.data.length_stages import LengthStages, PartOrder, RowPart
from lctrain.data.run_view import RunView
from lctrain.optim import learning_rate_factor
from tests.training import make_trainer

TOKENS = 32
STAGES = {0: 8, 3: 16, 5: 32}
DOCUMENTS = [[1000 * number + i for i in range(5 + 3 * number % 29)] for number in range(1, 70)]


class Seen(pl.LightningModule):
    """A module with one weight that records the documents of every batch."""

    def __init__(self, dies_at=None, interval="step", scheduler=LambdaLR):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.batches, self.rates, self.lengths = [], [], []
        self.dies_at, self.interval, self.scheduler = dies_at, interval, scheduler

    def training_step(self, batch, batch_idx):
        if len(self.batches) == self.dies_at:
            raise RuntimeError("died")
        self.batches.append((batch.input_ids[0].tolist(), batch.cu_seqlens.tolist()))
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return self.weight * batch.num_tokens / 100

    def on_train_batch_end(self, *_):
        self.lengths.append(self.trainer.callback_metrics.get("data/packed_length"))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        if self.scheduler is not LambdaLR:
            schedule = self.scheduler(optimizer, 1)
        else:
            schedule = LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": self.interval},
        }


def make_data(**settings):
    documents = [torch.tensor(document) for document in DOCUMENTS]
    return PackedDataModule(documents, max_tokens=TOKENS, tokenizer="unused", **settings)


def fit(tmp_path, module, *callbacks, stages=STAGES, path=None, data=None, **settings):
    options = {"max_epochs": -1, "max_steps": 12, "enable_checkpointing": True, **settings}
    learning_rate = options.pop("learning_rate", "steps")
    schedule = LengthSchedule(stages, learning_rate)
    trainer = make_trainer(tmp_path, [schedule, *callbacks], **options)
    trainer.fit(module, datamodule=data or make_data(num_workers=0), ckpt_path=path)
    return module


def test_parts_are_consecutive_and_hold_every_token_once(tmp_path):
    module = fit(tmp_path, Seen())
    plain = Seen()
    trainer = make_trainer(tmp_path, max_epochs=-1, max_steps=12)
    trainer.fit(plain, datamodule=make_data(num_workers=0))
    rows = [tokens for tokens, _ in plain.batches]
    found = [tokens for tokens, _ in module.batches]
    assert found[0] + found[1] + found[2] == rows[0][: len(rows[0]) * 3 // 4]  # the stage ends
    assert found[3] + found[4] == rows[1]
    assert found[5:] == rows[2:9]


def test_a_stage_lasts_for_whole_optimizer_steps(tmp_path):
    module = fit(tmp_path, Seen(), accumulate_grad_batches=2)
    sizes = [8] * 6 + [16] * 4 + [32] * 14
    assert len(module.batches) == len(sizes)
    for (tokens, _), size in zip(module.batches, sizes, strict=True):
        assert size // 2 < len(tokens) <= size


def test_limited_epochs_keep_the_stages(tmp_path):
    settings = {"accumulate_grad_batches": 2, "limit_train_batches": 4}
    assert (
        fit(tmp_path, Seen(), **settings).batches
        == fit(tmp_path, Seen(), accumulate_grad_batches=2).batches
    )


def test_documents_are_cut_at_borders_only():
    data = make_data()
    data.setup()
    rows = data._ready.train_rows
    for row in range(len(rows)):
        whole = rows[row]
        parts = [rows.part(row, part, 4) for part in range(4)]
        tokens = torch.cat([part.input_ids for part in parts], dim=1)
        assert torch.equal(tokens, whole.input_ids)
        ends = torch.cumsum(torch.tensor([part.num_tokens for part in parts]), 0).tolist()
        begins = [0, *ends[:-1]]
        borders = {
            begin + border
            for begin, part in zip(begins, parts, strict=True)
            for border in part.cu_seqlens.tolist()
        }
        assert borders == {*whole.cu_seqlens.tolist(), *ends, 0}
        assert all(part.position_ids[0, 0] == 0 for part in parts)


def test_a_row_with_fewer_tokens_than_parts_has_parts_without_targets():
    data = PackedDataModule([torch.arange(3)], max_tokens=TOKENS, tokenizer="unused")
    data.setup()
    parts = [data._ready.train_rows.part(0, part, 8) for part in range(8)]
    assert all(part.num_tokens == 1 for part in parts)
    assert all((part.labels == IGNORE_INDEX).all() for part in parts)


def test_labels_of_documents_are_cut_with_them():
    documents = [{"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, 6, 7, -100, 9, 10]}]
    data = PackedDataModule(documents, max_tokens=8, tokenizer="unused")
    data.setup()
    first, last = (data._ready.train_rows.part(0, part, 2) for part in range(2))
    assert first.labels[0].tolist() == [6, 7, -100]
    assert last.labels[0].tolist() == [9, 10, -100]


@pytest.mark.parametrize(("dies_at", "workers"), [(4, 1), (7, 0), (9, 0)])
def test_a_resumed_run_reads_the_same_parts(tmp_path, dies_at, workers):
    """It dies in the middle of a stage, or at its end."""
    settings = {"accumulate_grad_batches": 2, "max_steps": 8, "learning_rate": "tokens"}
    whole = fit(tmp_path, Seen(), **settings)
    dead = Seen(dies_at)
    saving = StepCheckpoint(tmp_path / "c", every_n_steps=1)
    data = make_data(num_workers=workers)
    with pytest.raises(RuntimeError, match="died"):
        fit(tmp_path, dead, saving, data=data, **settings)
    again = fit(tmp_path, Seen(), path=tmp_path / "c" / "last.ckpt", **settings)
    begin = dies_at // 2 * 2
    assert again.batches == whole.batches[begin:]
    assert again.rates == whole.rates[begin:]
    assert torch.equal(again.weight, whole.weight)


def test_other_stages_are_refused_after_a_resume(tmp_path):
    fit(tmp_path, Seen(), StepCheckpoint(tmp_path / "c", every_n_steps=4), max_steps=4)
    path = tmp_path / "c" / "last.ckpt"
    with pytest.raises(ValueError, match=r"length_stages was \{0: 8, 3: 16, 5: 32\}, is \{0: 16"):
        fit(tmp_path, Seen(), stages={0: 16}, path=path)
    plain = make_trainer(tmp_path, max_epochs=-1, max_steps=5)
    with pytest.raises(ValueError, match=r"length_stages was .*, is None"):
        plain.fit(Seen(), datamodule=make_data(), ckpt_path=path)


def test_every_rank_reads_the_same_parts_of_its_own_rows(monkeypatch):
    class Trainer:
        callbacks = (LengthSchedule({0: 8, 2: 32}),)
        accumulate_grad_batches = 1

    seen = {}
    for rank in range(2):
        data = make_data(num_workers=0)
        monkeypatch.setattr(RunView, "data_size", 2)
        monkeypatch.setattr(RunView, "data_rank", rank)
        data.setup()
        monkeypatch.setattr(RunView, "stages", LengthStages.of(Trainer))
        batches = iter(data.train_dataloader())
        seen[rank] = [next(batches) for _ in range(4)]
        assert data.settings["world_size"] == 2
    first, second = ([batch.input_ids[0].tolist() for batch in seen[rank]] for rank in range(2))
    assert all(max(len(x), len(y)) <= 8 for x, y in zip(first[:2], second[:2], strict=True))
    numbers = [number for tokens in first + second for number in tokens]
    assert len(set(numbers)) == len(numbers)


def test_the_order_of_parts_is_that_of_its_stages():
    order = PartOrder(LengthStages.read({0: 8, 3: 16, 5: 32}), 32, accumulated=2)
    found = [order(batch) for batch in range(13)]
    assert found[:4] == [RowPart(0, part, 4) for part in range(4)]
    assert found[4:6] == [RowPart(1, 0, 4), RowPart(1, 1, 4)]  # the stage ends inside the row
    assert found[6:8] == [RowPart(2, 0, 2), RowPart(2, 1, 2)]
    assert found[8:10] == [RowPart(3, 0, 2), RowPart(3, 1, 2)]
    assert found[10:] == [RowPart(row, 0, 1) for row in (4, 5, 6)]


def test_the_learning_rate_counts_tokens_if_asked(tmp_path):
    by_steps = fit(tmp_path, Seen()).rates
    by_tokens = fit(tmp_path, Seen(), learning_rate="tokens").rates
    assert by_steps == [1.0 / (1.0 + step) for step in range(12)]
    total = 3 * 8 + 2 * 16 + 7 * 32
    before = [0, 8, 16, 24, 40, 56, *(56 + 32 * step for step in range(1, 7))]
    assert by_tokens == [1.0 / (1.0 + 12 * tokens / total) for tokens in before]
    factor = learning_rate_factor(OptimConfig(warmup_steps=4), 12)
    assert math.isfinite(factor(12 * 8 / total))


def test_the_length_is_logged_and_reported(tmp_path, caplog):
    module = Seen()
    with caplog.at_level(logging.INFO, logger="lctrain"):
        fit(tmp_path, module)
    assert [length for length in module.lengths if length is not None][-1] == 32.0
    told = [record.message for record in caplog.records if "Packs have" in record.message]
    assert told == [
        f"Packs have {length} tokens from step {step} on" for step, length in STAGES.items()
    ]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([8, 16], "a mapping with a length at step 0, got [8, 16]"),
        ({5: 8}, "a mapping with a length at step 0, got {5: 8}"),
        ({0: 8, 1.5: 16}, "steps that are integers of at least 0, got 1.5"),
        ({0: 8, 2: "16"}, "lengths that are integers of at least 2, got '16'"),
        ({0: 1}, "lengths that are integers of at least 2, got 1"),
        ({0: 16, 2: 8}, "rising lengths, got 16, 8"),
    ],
)
def test_bad_stages_are_refused(stages, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LengthSchedule(stages)


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="learning_rate must be one of steps, tokens, got 'x'"):
        LengthSchedule({0: 8}, "x")
    with pytest.raises(
        ValueError, match=r"max_tokens=32, got 12\. Set max_tokens to a multiple of 12"
    ):
        fit(tmp_path, Seen(), stages={0: 12})
    with pytest.raises(
        ValueError, match=r"max_tokens=32, got 64\. Set max_tokens to a multiple of 64"
    ):
        fit(tmp_path, Seen(), stages={0: 8, 2: 64})
    with pytest.raises(ValueError, match=r"overfit_batches must be 0 .*, got 2"):
        fit(tmp_path, Seen(), overfit_batches=2)
    changing = GradientAccumulationScheduler({0: 1, 1: 2})
    with pytest.raises(ValueError, match="packs in every optimizer step, got a Gradient"):
        fit(tmp_path, Seen(), changing)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2 .*, got 3 batches"):
        fit(tmp_path, Seen(), accumulate_grad_batches=2, limit_train_batches=3)
    trainer = make_trainer(tmp_path, [LengthSchedule({0: 8})])
    with pytest.raises(ValueError, match="in a PackedDataModule, got a data loader"):
        trainer.fit(Seen(), torch.utils.data.DataLoader([1]))
    module = Seen(scheduler=torch.optim.lr_scheduler.StepLR)
    with pytest.raises(ValueError, match="LambdaLR that advance at every step, got StepLR"):
        fit(tmp_path, module, learning_rate="tokens")
    with pytest.raises(ValueError, match="got LambdaLR at every epoch"):
        fit(tmp_path, Seen(interval="epoch"), learning_rate="tokens")


def test_endless_streams_are_refused(tmp_path, monkeypatch):
    data = make_data()
    endless = dataclasses.replace(data.preparation.run(), stream=object())
    monkeypatch.setattr(type(data.preparation), "run", lambda _: endless)
    with pytest.raises(ValueError, match=r"got an endless stream. Set data.streaming=false"):
        fit(tmp_path, Seen(), data=data)
