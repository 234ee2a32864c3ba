"""Tests lctrain-train from the config to its files."""

import csv
import json
import math
import shlex
import sys
from dataclasses import replace
from importlib import resources

import pytest
import torch

from lctrain.config import (
    ModelConfig,
    OptimConfig,
    PretrainedModelConfig,
    ScratchModelConfig,
)
from lctrain.data.prepare import Preparation
from lctrain.optim import learning_rate_factor
from lctrain.train import main, train
from tests.numerics import as_float32, assert_equal_in_float64
from tests.strict import parse_files
from tests.train.runs import config, rows, train_losses, wandb_files, weights

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished run: (report, folder, output)."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("runs") / "1"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        report = train(config(*tiny, FINISHED, output_dir=folder))
    return report, folder, printed.getvalue()


FINISHED = "optim.learning_rate=0.01"  # of the run above


def test_report_says_what_happened_and_where_it_is(finished):
    report, folder, printed = finished
    assert str(report) in printed
    assert report.steps == 6
    assert report.last_loss < report.first_loss
    assert report.held_out_last < report.held_out_first
    assert report.tokens_per_second > 0
    assert 0.5 < report.fill <= 1.0
    assert report.imbalance is None
    assert report.held_out_packing != report.packing
    assert [length for length, _ in report.perplexities] == [16, 64]
    assert {"checkpoint", "metrics", "model", "perplexity plot", "perplexity table"} <= set(
        report.paths
    )
    for path in report.paths.values():
        assert path.exists()
        assert path.is_relative_to(folder)
    assert report.paths["perplexity plot"].read_bytes().startswith(b"\x89PNG")
    saved = json.loads((folder / "report.json").read_text())
    assert saved["held_out_packing"] == report.held_out_packing
    assert saved["paths"] == {name: str(path) for name, path in report.paths.items()}


def test_files_are_json_for_every_reader_whatever_the_losses_are(finished, tmp_path):
    report, folder, _ = finished
    assert {"report.json", "run.json", "model/config.json"} <= parse_files(folder).keys()
    changed = {"held_out_last": math.nan, "perplexities": ((16, math.inf), (64, 2.0))}
    replace(report, **changed, held_out_sets={"a": (1.0, math.nan)}).save(tmp_path)
    saved = parse_files(tmp_path)["report.json"]
    assert saved["held_out_last"] is None
    assert saved["perplexities"] == [[16, None], [64, 2.0]]
    assert saved["held_out_sets"] == {"a": [1.0, None]}
    assert saved["steps"] == report.steps


def test_report_is_ten_lines_that_name_what_is_to_be_looked_at(finished):
    report, folder, printed = finished
    lines = str(report).splitlines()
    assert len(lines) <= 10
    assert printed.endswith(f"{report}\n")
    assert (folder / "report.txt").read_text() == f"{report}\n"
    for name in ("perplexity plot", "model"):
        assert str(report.paths[name]) in str(report)
    assert str(folder / "report.json") in str(report)
    assert f"lctrain-eval model={report.paths['model']} data=text" in lines[-1]
    assert "held-out text" in lines[1]
    assert "(lower is better)" in lines[1]


def test_metrics_file(finished):
    _, folder, _ = finished
    held_out = [row["step"] for row in rows(folder) if row["val/loss"]]
    assert held_out == ["0", "6"]
    last = next(row for row in rows(folder) if row["step"] == "5")
    for name in ("train/loss", "train/learning_rate", "train/gradient_norm", "throughput/fill"):
        assert float(last[name]) > 0
    assert float(last["throughput/tokens_per_second"]) > 0
    assert float(last["memory/peak_gib"]) > 0


@pytest.mark.usefixtures("float64_stays_float64")
def test_plain_transformers_loads_the_export_with_the_same_logits(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lctrain.batch import PackedBatch
    from lctrain.models import patch_model

    report, folder, _ = finished
    exported = AutoModelForCausalLM.from_pretrained(report.paths["model"])
    tokenizer = AutoTokenizer.from_pretrained(report.paths["model"])
    trained = {name.removeprefix("model."): value for name, value in weights(folder).items()}
    for name, value in exported.state_dict().items():
        assert torch.equal(value, trained[name])
    documents = [torch.tensor(tokenizer("def return class").input_ids), torch.arange(9)]
    exported.double()
    alone = [exported(input_ids=ids[None]).logits[0] for ids in documents]
    with patch_model(exported), torch.no_grad():
        packed = exported(**PackedBatch.from_documents(documents).model_kwargs()).logits[0]
    assert_equal_in_float64(packed, torch.cat(alone))
    stated = (report.paths["model"] / "config.json").read_text()
    assert "lctrain" not in stated
    assert '"max_position_embeddings": 128' in stated  # trained on pieces of 128 tokens
    assert "128 tokens" in (report.paths["model"] / "README.md").read_text()


@pytest.mark.parametrize(
    "overrides",
    [("model=tiny", "model.model_type=diffllama"), ("model=tiny", "model.differential=2")],
    ids=["version_1", "version_2"],
)
def test_differential_models_train_and_their_exports_load(overrides, tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "1"
    report = train(config(*tiny, *overrides, "attention=differential", output_dir=folder))
    exported = AutoModelForCausalLM.from_pretrained(report.paths["model"])
    trained = {name.removeprefix("model."): value for name, value in weights(folder).items()}
    assert all(torch.equal(value, trained[name]) for name, value in exported.state_dict().items())
    assert any("lambda" in name for name in trained)
    assert len(report.perplexities) == 2


def test_resume_goes_on_for_longer(finished, tiny, tmp_path):
    """Resumes in a new folder from the newest run of that name, and notes the original run.

    From the first new step on, the learning rates are those of a run of eight steps.
    """
    first, folder, _ = finished
    report = train(
        config(
            *tiny,
            FINISHED,
            "trainer.max_steps=8",
            f"paths.runs_dir={folder.parent}",
            "ckpt_path=last",
            "evaluation.enabled=false",
            "export=false",
            output_dir=tmp_path / "2",
        )
    )
    assert report.steps == 8
    assert report.first_loss == first.first_loss
    assert report.held_out_first == first.held_out_first
    assert list(train_losses(tmp_path / "2")) == [*"01234567"]
    factor = learning_rate_factor(OptimConfig(), 8)
    rates = [float(r["train/learning_rate"]) for r in rows(tmp_path / "2") if r["train/loss"]]
    assert rates[6:] == [as_float32(0.01 * factor(step)) for step in (6, 7)]
    assert "model" not in report.paths


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.max_tokens=96", "max_tokens was 128, is 96"),
        ("data.overlong=drop", "overlong was 'split', is 'drop'"),
        ("optim.learning_rate=0.02", "optim.learning_rate was 0.01, is 0.02.*without ckpt_path"),
    ],
)
def test_resume_with_other_settings(finished, tiny, tmp_path, override, named):
    checkpoint = finished[1] / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=named):
        train(
            config(*tiny, FINISHED, override, f"ckpt_path={checkpoint}", output_dir=tmp_path / "2")
        )
    assert not (tmp_path / "2" / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ckpt_path=last", "ckpt_path=last needs an earlier checkpoint"),
        ("ckpt_path=none.ckpt", "must be a checkpoint file or last"),
        ("evaluation.lengths=[1]", "lengths must be at least 2, got 1"),
        ("evaluation.max_tokens=32", "lengths must be at most max_tokens"),
        ("evaluation.documents=0", "evaluation.documents must be at least 1, got 0"),
        ("evaluation.document_tokens=1", "evaluation.document_tokens must be at least 2, got 1"),
        ("evaluation.passkey_lengths=[64]", "evaluation.methods must name at least one with"),
        ("evaluation.keys_per_cell=0", "evaluation.keys_per_cell must be at least 1, got 0"),
        ("data.max_tokens=1", "max_tokens must be at least 2, got 1"),
        ("trainer.max_steps=-1", "must be set, got neither"),
        ("data.files=[/no/such/*.txt]", "/no/such"),
        ("attention.name=flesh", "flesh"),
        ("optim.schedule=step", "optim.schedule must be one of"),
        ("model.model_type=lama", "must be a family of transformers"),
    ],
)
def test_bad_input_is_named_before_training(tiny, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        train(config(*tiny, override, output_dir=tmp_path / "1"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.model_type=lama", "must be a family of transformers, got 'lama'"),
        ("+model.config.hidden=3", "model.config.hidden must be an argument of LlamaConfig"),
        ("attention.name=flesh", "attention must be one of .* got 'flesh'"),
        ("attention.backend=cutlass", "backend must be"),
        ("attention.dropout=1.5", "dropout must be in"),
        ("optim.schedule=step", "optim.schedule must be one of"),
        ("optim.warmup_steps=30", "optim.warmup_steps must be at most the 6 steps"),
        ("trainer.strategy=fsdp", "trainer.strategy must be one of"),
        ("callbacks.checkpoint.directory=FILE/c", "checkpoint directory must be writable"),
        ("ckpt_path=none.ckpt", "must be a checkpoint file or last"),
        ("evaluation.documents=0", "evaluation.documents must be at least 1"),
    ],
)
def test_bad_input_is_named_before_data_are_read(tiny, tmp_path, monkeypatch, override, message):
    def read(self):
        raise AssertionError("the data was read")

    monkeypatch.setattr(Preparation, "run", read)
    (tmp_path / "file").write_text("")
    override = override.replace("FILE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=message):
        train(config(*tiny, override, output_dir=tmp_path / "1"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ScratchModelConfig(model_type="mamba"), "attention only, got MambaForCausalLM"),
        (PretrainedModelConfig(name_or_path="/no/such"), "got /no/such, which does not exist"),
        (ModelConfig(), "model must be a ScratchModelConfig or a PretrainedModelConfig"),
        (
            ScratchModelConfig(model_type="gpt2", config={"n_positions": 32}),
            "data.max_tokens must be at most 32, the number of positions .* of GPT2LMHeadModel",
        ),
    ],
    ids=["unpatchable", "no-folder", "no-model", "position-table"],
)
def test_models_are_checked_before_data_are_read(tiny, tmp_path, model, message):
    plain = config(*tiny, "data.files=[/no/such/*.txt]", output_dir=tmp_path / "1")
    with pytest.raises(ValueError, match=message):
        train(replace(plain, model=model))


def test_passkey_lengths_fit_the_positions_of_the_model(tiny, tmp_path):
    keys = ["evaluation.methods=[plain]", "evaluation.passkey_lengths=[64,512]"]
    plain = config(*tiny, *keys, "data.files=[/no/such/*.txt]", output_dir=tmp_path / "1")
    model = ScratchModelConfig(model_type="gpt2", config={"n_positions": 256})
    with pytest.raises(ValueError, match=r"evaluation.passkey_lengths must be at most 256, .* 512"):
        train(replace(plain, model=model))


def test_a_failing_evaluation_does_not_lose_the_export(tiny, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("the evaluation failed")

    monkeypatch.setattr("lctrain.closing.evaluate_at_end", fail)
    with pytest.raises(RuntimeError, match="the evaluation failed"):
        train(config(*tiny, "trainer.max_steps=1", output_dir=tmp_path / "1"))
    assert (tmp_path / "1" / "model" / "model.safetensors").exists()


def test_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="checkpoint directory must be writable"):
        train(config(*tiny, output_dir=tmp_path / "file" / "1"))


def test_multirun_and_saved_config(tiny, tmp_path, monkeypatch):
    """Starts two runs with one command; each has a folder with its resolved config."""
    short = ["trainer.max_steps=1", "evaluation.enabled=false", "export=false"]
    sweep = [f"hydra.sweep.dir={tmp_path}/sweep", "seed=3,4", "name=two", "--multirun"]
    monkeypatch.setattr(sys, "argv", ["lctrain-train", *tiny, *short, *sweep])
    main()
    for number, seed in (("0", 3), ("1", 4)):
        text = (tmp_path / "sweep" / number / "config.yaml").read_text()
        assert f"\nseed: {seed}\n" in text
        assert f"\n  seed: {seed}\n" in text  # data.seed, resolved
        assert "${" not in text
        assert (tmp_path / "sweep" / number / "metrics.csv").exists()


def test_first_line_of_every_recipe_runs(tiny, tmp_path):
    recipes = [*(resources.files("lctrain.recipes") / "experiment").iterdir()]
    assert recipes
    for recipe in recipes:
        words = shlex.split(recipe.read_text().splitlines()[0].removeprefix("#"))
        if words[:2] == ["python", "-m"]:  # tests/recipes runs them
            assert words[2].removeprefix("lctrain.recipes.") in recipe.name
            continue
        assert words[0] == "lctrain-train"
        assert f"experiment={recipe.name.removesuffix('.yaml')}" in words
        small = ["trainer.max_steps=2", "data.num_workers=0", "model.config.hidden_size=48"]
        small += ["model.config.num_hidden_layers=1", "trainer.limit_val_batches=1"]
        small += ["trainer.validate_every_n_steps=1", "data.passkey_fraction=0"]
        small += ["data.max_document_tokens=null", "evaluation.stride=null"]
        data = [word for word in tiny if word.startswith(("data", "evaluation", "trainer.acc"))]
        report = train(config(*words[1:], *data, *small, output_dir=tmp_path / recipe.name))
        assert report.steps == 2


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tiny, tmp_path, monkeypatch):
    """Without a key or a network, scalars, table and plot are written to the disk."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    report = train(config(*tiny, "logger=wandb", "trainer.max_steps=2", output_dir=tmp_path / "1"))
    (file,) = wandb_files(tmp_path / "1")
    folder, recorded = file.parent, file.read_bytes()
    for name in (
        "train/loss",
        "throughput/tokens_per_second",
        "throughput/fill",
        "memory/peak_gib",
        "perplexity_by_length",
        "perplexity_by_length_plot",
    ):
        assert name.encode() in recorded, name
    table = next((folder / "files" / "media" / "table").glob("*.json")).read_text()
    assert f"{report.perplexities[0][1]:.6g}"[:5] in table
    images = folder / "files" / "media" / "images"
    assert next(images.glob("*.png")).read_bytes().startswith(b"\x89PNG")
    assert report.paths["metrics"].exists()


@pytest.mark.filterwarnings("ignore")
def test_every_job_of_a_multirun_is_a_wandb_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    short = ["trainer.max_steps=1", "trainer.limit_val_batches=1", "evaluation.enabled=false"]
    sweep = [f"hydra.sweep.dir={tmp_path}/sweep", "seed=3,4", "export=false", "--multirun"]
    monkeypatch.setattr(sys, "argv", ["lctrain-train", *tiny, *short, "logger=wandb", *sweep])
    main()
    runs = [[*(tmp_path / "sweep" / job / "wandb").glob("offline-run-*")] for job in ("0", "1")]
    assert [len(found) for found in runs] == [1, 1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["evaluation.methods=[plain]", "evaluation.passkey_lengths=[8,256]"],
            r"evaluation.passkey_lengths must be at least \d+, the tokens of key.* got 8. Leave",
        ),
        (
            ["evaluation.begin_token=true"],
            "begin_token must be null or false for a tokenizer without a begin token",
        ),
    ],
    ids=["passkey_lengths", "begin_token"],
)
def test_the_closing_evaluation_is_checked_before_training(tiny, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(config(*tiny, *overrides, output_dir=tmp_path / "1"))
    assert not list(tmp_path.glob("1/checkpoints/*"))


def test_the_closing_evaluation_compares_ways_beyond_the_window(tiny, tmp_path, capsys):
    """A model trained at 32 tokens is evaluated at 64, with plain RoPE and dual chunk."""
    settings = [
        "model.config.max_position_embeddings=32",
        "data.max_document_tokens=32",
        "evaluation.methods=[plain,dual_chunk]",
        "evaluation.stride=8",
        "evaluation.passkey_lengths=[96,128]",
        "evaluation.keys_per_cell=2",
        "trainer.max_steps=1",
    ]
    report = train(config(*tiny, *settings, output_dir=tmp_path / "1"))
    table = list(csv.DictReader(report.paths["perplexity table"].read_text().splitlines()))
    by_cell = {(row["method"], row["length"]): float(row["loss"]) for row in table}
    assert set(by_cell) == {(m, n) for m in ("plain", "dual_chunk") for n in ("16", "64")}
    assert by_cell["plain", "16"] == by_cell["dual_chunk", "16"]  # inside the window
    assert by_cell["plain", "64"] != by_cell["dual_chunk", "64"]
    printed = capsys.readouterr().out
    assert "Perplexity by context length and method" in printed
    assert "Passkeys found" in printed
    keys = list(csv.DictReader(report.paths["passkey table"].read_text().splitlines()))
    assert {(row["method"], row["length"]) for row in keys} == {
        (method, length) for method in ("plain", "dual_chunk") for length in ("96", "128")
    }
    assert sum(int(row["keys"]) for row in keys) == 2 * 2 * 5 * 2
    hidden = "of 10 keys hidden in texts of 128 tokens, 4 times the trained length"
    assert report.findings["keys"].startswith(hidden)
    assert "perplexity at 64 tokens, 2 times the trained length: plain" in str(report)
    assert len(str(report).splitlines()) <= 10
    assert report.paths["passkey plot"].is_file()
    assert f"lctrain-eval model={report.paths['model']}" in printed.splitlines()[-1]


def test_methods_that_the_model_lacks_are_refused_before_the_data_is_read(tiny, tmp_path):
    settings = config(*tiny, "evaluation.methods=[ntk]", output_dir=tmp_path / "1")
    gpt2 = ScratchModelConfig(model_type="gpt2", config={"n_embd": 16, "n_layer": 1, "n_head": 2})
    with pytest.raises(
        ValueError, match=r"^evaluation\.methods must be methods that the model sup"
    ):
        train(replace(settings, model=gpt2, attention=None))
    assert not (tmp_path / "1" / "metrics.csv").exists()


def test_the_closing_passkeys_can_be_of_the_shipped_model(tiny, tmp_path, capsys):
    """The report and the table name the model; the lengths may exceed the trained model's."""
    settings = [
        "evaluation.methods=[dual_chunk]",
        "evaluation.passkey_model=shipped",
        "evaluation.passkey_lengths=[64,512]",
        "evaluation.keys_per_cell=1",
        "trainer.max_steps=1",
    ]
    report = train(config(*tiny, *settings, output_dir=tmp_path / "1"))
    shipped = "lctrain's shipped model, trained on passkeys only"
    assert report.findings["keys"].endswith(f"(by {shipped}; not by the model of this run)")
    assert "in texts of 512 tokens, 4 times the trained length" in report.findings["keys"]
    saved = json.loads((tmp_path / "1" / "passkeys" / "passkey_retrieval.json").read_text())
    assert saved["name"] == shipped
    assert saved["window"] == 128  # the shipped model's
    assert sum(row["found"] for row in saved["rows"]) > 0
    assert f"Passkeys found by {shipped}" in capsys.readouterr().out
    assert len(str(report).splitlines()) <= 10
