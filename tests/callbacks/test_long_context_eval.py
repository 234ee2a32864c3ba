"""Tests LongContextEval: it evaluates during training, and leaves the training unchanged."""

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger

from lctrain.callbacks import LongContextEval, long_context_eval
from lctrain.config import NeedleConfig, OptimConfig, PasskeyConfig, RulerConfig
from lctrain.data import TokenizedDocument
from lctrain.distributed import Topology
from lctrain.eval.run_task import Run
from lctrain.eval.untouched import untouched
from lctrain.loggers import MetricsCSV
from lctrain.module import LongContextModule
from tests.eval.word_tokenizer import WordTokenizer
from tests.training import loader, make_batch, make_trainer

PACKS = [make_batch([12, 5], i) for i in range(4)]


class Data(pl.LightningDataModule):
    """Packs of random tokens, and held-out text of a word tokenizer."""

    def __init__(self):
        super().__init__()
        self.tokenizer = WordTokenizer()
        text = " ".join(f"Sentence {n} tells of a calm river." for n in range(90))
        self.ids = np.array(self.tokenizer(text)["input_ids"])

    def train_dataloader(self):
        return loader(PACKS)

    def held_out_documents(self):
        return [TokenizedDocument(str(n), self.ids[: 500 + n], n) for n in range(4)]


class Shown(Logger):
    """A logger with tables and pictures, as that of Weights and Biases."""

    name = version = "shown"

    def __init__(self):
        super().__init__()
        self.metrics, self.tables, self.pictures = {}, {}, {}

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_table(self, key, columns, data):
        random.random()  # as a logger may that makes up names
        self.tables[key] = columns, data

    def log_image(self, key, images):
        with open(images[0], "rb") as file:
            self.pictures[key] = file.read(4)


def run(tmp_path, make_llama, callbacks, logger=False):
    torch.manual_seed(0)
    model = make_llama(attention_dropout=0.2, vocab_size=3000, max_position_embeddings=1024)
    losses = []

    class Module(LongContextModule):
        def training_step(self, batch, batch_idx):
            random.random()
            result = super().training_step(batch, batch_idx)
            losses.append(result["loss"].item() if isinstance(result, dict) else result.item())
            losses.append(random.random() + np.random.rand() + torch.rand(1).item())
            return result

    module = Module(model, OptimConfig())
    random.seed(0)
    np.random.seed(0)
    trainer = make_trainer(tmp_path, callbacks, logger=logger)
    trainer.fit(module, datamodule=Data())
    assert all(part.training for part in model.modules())
    return losses, model


TASKS = {
    "tasks": ["perplexity", "passkey", "needle", "ruler"],
    "passkey": PasskeyConfig(depths=[0.0, 1.0], keys_per_cell=1),
    "needle": NeedleConfig(depths=[0.5], needles=1),
    "ruler": RulerConfig(tasks=["niah_single_1"], items=1),
}


def test_losses_weights_and_random_numbers_are_the_same_to_the_bit(tmp_path, make_llama):
    plain, before = run(tmp_path, make_llama, [])
    logger = MetricsCSV(str(tmp_path / "log"))
    callback = LongContextEval([300, 400], every_n_steps=2, **TASKS)
    measured, after = run(tmp_path, make_llama, [callback], logger)
    assert measured == plain
    assert all(map(torch.equal, before.parameters(), after.parameters()))
    rows = logger.path.read_text().splitlines()
    names = rows[0].split(",")
    for name in (
        "perplexity_300",
        "passkey_plain_400",
        "needle_0.5_300",
        "ruler_niah_single_1_400",
    ):
        column = names.index(f"val/{name}")
        assert [row.split(",")[0] for row in rows[1:] if row.split(",")[column]] == ["1", "3"]


def test_tables_lines_and_heatmaps_are_logged(tmp_path, make_llama):
    run(tmp_path, make_llama, [])
    before = random.getstate()
    logger = Shown()
    run(tmp_path, make_llama, [LongContextEval([300, 400], every_n_steps=4, **TASKS)], logger)
    assert random.getstate() == before
    stems = {"perplexity_by_length", "passkey_retrieval", "needle", "ruler"}
    assert set(logger.tables) == {f"val/{stem}" for stem in stems}
    assert set(logger.pictures.values()) == {b"\x89PNG"}
    assert len(logger.pictures) == 4
    columns, data = logger.tables["val/ruler"]
    assert "strict" in columns
    assert len(data) == 2


def test_tensorboard_shows_pictures(tmp_path, make_llama):
    from lctrain.loggers import tensorboard_logger

    logger = tensorboard_logger(str(tmp_path))
    run(tmp_path, make_llama, [LongContextEval([16], every_n_steps=4)], logger)
    logger.close()
    events = b"".join(file.read_bytes() for file in tmp_path.rglob("events*"))
    assert b"val/perplexity_by_length_plot" in events


def test_cells_beyond_the_budget_are_left_out_with_a_warning(
    tmp_path, make_llama, monkeypatch, caplog
):
    ticks = iter(range(1000))
    monkeypatch.setattr(long_context_eval.time, "monotonic", lambda: float(next(ticks)))
    logger = Shown()
    callback = LongContextEval([16, 32, 64], every_n_steps=4, budget_s=1.5)
    run(tmp_path, make_llama, [callback], logger)
    assert {name for name in logger.metrics if "val/" in name} == {"val/perplexity_16"}
    assert "left out 2 of 3 cells, which budget_s=1.5 did not allow. Raise it" in caplog.text


def test_a_cell_that_cannot_be_computed_does_not_end_the_training(
    tmp_path, make_llama, monkeypatch, caplog
):
    compute = Run.compute_cell

    def fails(self, cell, done, bar):
        if cell.length == 32:
            raise ValueError("no key tokens")
        compute(self, cell, done, bar)

    monkeypatch.setattr(Run, "compute_cell", fails)
    logger = Shown()
    run(tmp_path, make_llama, [LongContextEval([16, 32], every_n_steps=4)], logger)
    assert {name for name in logger.metrics if "val/" in name} == {"val/perplexity_16"}
    assert "LongContextEval left out perplexity at 32: no key tokens" in caplog.text
    assert "budget_s" not in caplog.text


def test_ranks_divide_the_cells(tmp_path, make_llama, monkeypatch):
    callback = LongContextEval([16, 32, 64], every_n_steps=9)
    run(tmp_path, make_llama, [callback])
    parts = []
    monkeypatch.setattr(
        long_context_eval, "_gathered", lambda done, ranks: parts.append(done) or done
    )
    monkeypatch.setattr(Topology, "_exchange", lambda ranks, value: [value] * ranks.size)
    for rank in (0, 1):
        callback._compute(Topology(rank=rank, size=2))
    assert [[cell.length for cell in part] for part in parts] == [[16, 64], [32]]
    both = callback._compute(Topology())
    assert both == parts[0] | parts[1]
    assert len(callback._compute(Topology(size=2, is_sharded=True))) == 3


def test_an_evaluation_leaves_random_numbers_alone_even_after_an_error(make_llama):
    model = make_llama().train()
    model.lm_head.eval()
    before = random.getstate(), torch.get_rng_state()

    def fail():
        with untouched(model):
            random.seed(1)
            torch.manual_seed(1)
            raise RuntimeError(f"training is {model.training}")

    with pytest.raises(RuntimeError, match="training is False"):
        fail()
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert model.training
    assert not model.lm_head.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"budget_s": 0}, "budget_s must be above 0, got 0. Use null"),
        ({"cache_gib": 0}, "cache_gib must be a finite number above 0, got 0. Use null"),
        ({"documents": 0}, "documents must be at least 1, got 0"),
        ({"tasks": []}, "tasks must name at least one, got none"),
        ({"tasks": ["needles"]}, "tasks must be some of perplexity"),
        ({"lengths": [1]}, "lengths must be at least 2, got 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LongContextEval(**{"lengths": [8], "every_n_steps": 1} | settings)


def test_a_task_that_cannot_be_run_is_an_error_before_training(tmp_path, make_llama):
    callback = LongContextEval([16], every_n_steps=1, tasks=["needle"])
    with pytest.raises(ValueError, match="needle lengths must be at least"):
        run(tmp_path, make_llama, [callback])
