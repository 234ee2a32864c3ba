"""Tests that every held-out set has a loss of its own, from the module to the report of a run."""

import csv
import json
import sys

import pytest
import torch

from lctrain import PackedBatch, train
from lctrain.data import PackedDataModule
from lctrain.module import LongContextModule
from tests.numerics import as_float32, near
from tests.training import loader, make_trainer

DOCUMENTS = [[3 + i, 4, 5, 6, 7 + i, 8] for i in range(8)]
SETS = {"code": [[9, 8, 7, 6, 5]] * 3, "news": [[3, 3, 3], [4, 4, 4, 4, 4, 4]]}


@pytest.fixture
def validated(tmp_path, make_llama):
    """Returns validated(sets), the metrics of a validation and the module."""

    def run(sets):
        torch.manual_seed(0)
        module = LongContextModule(make_llama(), attention=None)
        data = PackedDataModule(DOCUMENTS, held_out=sets, max_tokens=12, held_out_fraction=0.0)
        trainer = make_trainer(tmp_path)
        trainer.validate(module, data, verbose=False)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}, module

    return run


def test_every_set_has_a_loss_and_the_whole_counts_tokens(validated):
    metrics, module = validated(SETS)
    targets = {"code": 12, "news": 7}
    total = 0.0
    for name, documents in SETS.items():
        found, alone = validated({name: documents})
        ((_, loss),) = alone.held_out_losses
        assert set(found) == {"val/loss", "val/perplexity"}
        assert not alone.held_out_set_losses
        assert module.held_out_set_losses[name] == [(0, near(loss))]
        assert metrics[f"val/{name}/loss"] == as_float32(loss)
        assert metrics[f"val/{name}/perplexity"] == found["val/perplexity"]
        total += loss * targets[name]
    assert module.held_out_losses == [(0, near(total / sum(targets.values())))]


def test_loaders_of_the_users_do_not_get_the_names_of_the_sets(tmp_path, make_llama):
    data = PackedDataModule(DOCUMENTS, held_out=SETS, max_tokens=12, held_out_fraction=0.0)
    module, trainer = LongContextModule(make_llama(), attention=None), make_trainer(tmp_path)
    trainer.test(module, data, verbose=False)
    assert {"test/code/loss", "test/news/loss"} <= set(trainer.callback_metrics)
    others = [loader([PackedBatch.from_documents([row])]) for row in DOCUMENTS[:2]]
    trainer.test(module, dataloaders=others, verbose=False)
    names = {name for name in trainer.callback_metrics if name.endswith("/loss")}
    assert names == {"test/loss", "test/0/loss", "test/1/loss"}


def test_held_out_token_ids_that_are_trained_on_are_counted_in_a_warning(caplog):
    sets = {"code": [*DOCUMENTS[:2], [9, 8, 7]], "news": SETS["news"]}
    data = PackedDataModule(DOCUMENTS, held_out=sets, max_tokens=12, held_out_fraction=0.0)
    data.setup()
    (message,) = [text for text in caplog.messages if "in the training data, too" in text]
    assert message.startswith("The held-out set code: 2 of 3 held-out documents")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_run_on_a_mix_reports_every_source(tmp_path, monkeypatch, capsys):
    for kind in ("prose", "code"):
        (tmp_path / kind).mkdir()
        for number in range(12):
            text = f"{kind} {number} " * (20 + number)
            (tmp_path / kind / f"{number:02}.txt").write_text(text)
    (tmp_path / "new.txt").write_text("A text of another kind. " * 9)
    parts = [f"{{kind: text, name: {kind}, files: [{tmp_path}/{kind}/*.txt], weight: {weight}}}"
             for kind, weight in (("prose", 2), ("code", 1))]  # fmt: skip
    overrides = [
        *("data=mix", "model=tiny", "trainer.accelerator=cpu", "trainer.max_steps=2"),
        *("data.max_tokens=128", "data.vocab_size=300", "data.held_out_fraction=0.2"),
        *("evaluation.lengths=[8,16]", "trainer.enable_progress_bar=false"),
        f"data.sources=[{', '.join(parts)}]",
        f"data.held_out_sets={{new: {{kind: text, files: [{tmp_path}/new.txt]}}}}",
        f"data.cache_dir={tmp_path}/cache",
        f"paths.root={tmp_path}",
        f"paths.output_dir={tmp_path}/run",
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lctrain-train", *overrides])
    train.main()
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(report["held_out_sets"]) == ["prose", "code", "new"]
    assert "; prose 6" in report["data"]
    assert "prose: " in report["packing"]
    assert "; new: " in report["held_out_packing"]
    assert "held out  prose " in printed
    assert "data=mix" in printed.splitlines()[-1]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        columns = csv.DictReader(file).fieldnames
    assert {f"val/{name}/loss" for name in report["held_out_sets"]} <= set(columns)
