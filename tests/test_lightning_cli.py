"""Tests LightningCLI: every public class can be built from YAML, and `fit --config` trains."""

import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest
import yaml

import lctrain
from lctrain import callbacks, data
from lctrain.config import DataConfig, DataOptions, DataSettings
from tests.forked import run_forked
from tests.house.typecheck import ROOT

jsonargparse = pytest.importorskip("jsonargparse")

SCRIPT = """
from lightning.pytorch.cli import LightningCLI
import lctrain

LightningCLI(lctrain.LongContextModule, lctrain.PackedDataModule)
"""
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
CALLBACKS = {
    "PatchAttention": {"attention": "dual_chunk", "chunk_size": 32, "models": ["model"]},
    "ThroughputMonitor": {"max_tokens": 64},
    "IsolationCheck": {"model": "model"},
    "NonFiniteLossGuard": {},
    "StepCheckpoint": {"directory": "checkpoints", "every_n_steps": 1},
    "LengthPerplexity": {"lengths": [8], "every_n_steps": 2, "documents": 1},
    "TokenProgressBar": {"refresh_rate": 2},
    "BatchSeed": {"seed": 5},
    "ResumeOrder": {},
    "StepBudget": {"seconds": 60.0},
}
OTHERS = {
    "AttentionSchedule": {"stages": {0: {"attention": "flash"}, 5: {"attention": "dual_chunk"}}},
    "LongContextEval": {"lengths": [8], "every_n_steps": 2, "documents": 1},
    "LengthSchedule": {"stages": {0: 8, 5: 16}, "learning_rate": "tokens"},
    "TokenExactLoss": {
        "reduction": "mean",
        "count_tokens": "tests.test_lightning_cli.count",
        "read_batch": "tests.test_lightning_cli.read",
    },
}


def count(batch):
    """Returns a batch's token count; a YAML file names this function."""
    return batch.num_valid_tokens


def read(batch):
    """Returns a batch; a YAML file names this function."""
    return batch


def build(cls, settings):
    """Returns the object that jsonargparse builds from a class path and arguments as YAML text."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(cls, "made")
    path = f"{cls.__module__}.{cls.__qualname__}"
    text = yaml.safe_dump({"made": {"class_path": path, "init_args": settings}})
    return parser.instantiate_classes(parser.parse_string(text)).made


def test_every_callback_has_a_case():
    public = {
        name
        for name in callbacks.__all__
        if not name.endswith("Error") and name != "AtomicCheckpointIO"
    }
    assert public == CALLBACKS.keys() | OTHERS.keys()


@pytest.mark.parametrize(("name", "settings"), (CALLBACKS | OTHERS).items(), ids=str)
def test_callbacks_from_yaml(name, settings):
    cls = getattr(callbacks, name)
    made = build(cls, settings)
    assert type(made) is cls
    if name == "AttentionSchedule":
        assert [stage.step for stage in made.stages] == [0, 5]
    if name == "LengthSchedule":
        assert made.length_stages.lengths == (8, 16)
    if name == "TokenExactLoss":
        assert made.count_tokens is count
        assert made.read_batch is read


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("StdlibSource", {"max_documents": 3}),
        ("PackagesSource", {"max_bytes": 100}),
        ("TextSource", {"files": ["a.txt"]}),
        ("JsonlSource", {"files": ["a.jsonl"], "field": "content"}),
        ("ParquetSource", {"files": ["a.parquet"]}),
        ("HubSource", {"dataset": "owner/name"}),
    ],
)
def test_data_from_yaml(name, settings):
    made = build(getattr(data, name), settings)
    for key, value in settings.items():
        found = getattr(made, key)
        assert (list(found) if isinstance(found, tuple) else found) == value


def test_a_collator_from_yaml():
    """A user's class takes the collator, a function with settings, as an argument."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(data.PackCollator, "made")
    made = parser.instantiate_classes(parser.parse_object({"made": {"max_tokens": 8}})).made
    assert made == data.PackCollator(max_tokens=8)


def test_a_data_module_from_yaml():
    source = {"class_path": "lctrain.data.TextSource", "init_args": {"files": ["a.txt"]}}
    made = build(lctrain.PackedDataModule, {"source": source, "max_tokens": 64})
    assert isinstance(made.preparation.source, data.TextSource)
    assert made.max_tokens == 64


def test_a_data_module_takes_every_setting_of_the_data():
    """DataSettings alone declares defaults, for this module and for Hydra's YAML."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(lctrain.PackedDataModule, "made")
    values = parser.parse_object({"made": {}}).made
    for field in fields(DataSettings):
        assert values[field.name] == field.default
    assert {field.name for field in fields(DataConfig)} == {
        "tokenizer",
        "held_out_sets",  # the argument held_out
        *(field.name for field in fields(DataSettings)),
    }
    with pytest.raises(TypeError, match=r"settings must be .*, got max_token. Did you mean max_t"):
        lctrain.PackedDataModule(max_token=64)
    with pytest.raises(TypeError, match=r"settings must be .*, got zzz. Leave it out"):
        lctrain.PackedDataModule(zzz=1)


def test_editors_and_type_checkers_see_every_setting_of_the_data():
    assert get_type_hints(DataOptions) == get_type_hints(DataSettings)
    assert not DataOptions.__required_keys__
    source = inspect.getsource(lctrain.PackedDataModule.__init__)
    assert "**settings: Unpack[DataOptions]" in source


@pytest.mark.parametrize("model", [LLAMA, "some/name", "module"], ids=["mapping", "name", "module"])
def test_a_module_from_yaml(model):
    if model == "module":
        model = {
            "class_path": "torch.nn.Linear",
            "init_args": {"in_features": 1, "out_features": 1},
        }
    made = build(
        lctrain.LongContextModule,
        {"model": model, "optim": {"learning_rate": 0.5}, "attention": {"name": "dual_chunk"}},
    )
    assert made.optim.learning_rate == 0.5
    assert made.attention.name == "dual_chunk"


def test_fit_from_a_config(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(" ".join(f"word {i} {j}" for j in range(80)))
    entries = [
        {"class_path": f"lctrain.callbacks.{name}", "init_args": settings}
        for name, settings in CALLBACKS.items()
    ]
    config = {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 2,
            "logger": False,
            "callbacks": entries,
        },
        "model": {"model": LLAMA, "optim": {"learning_rate": 0.01}},
        "data": {
            "source": {"class_path": "lctrain.data.TextSource", "init_args": {"files": ["*.txt"]}},
            "max_tokens": 64,
            "vocab_size": 300,
            "held_out_fraction": 0.3,
            "cache_dir": "cache",
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "main.py").write_text(SCRIPT)
    done = run_forked(str(tmp_path / "main.py"), "fit", "--config", "run.yaml", cwd=tmp_path)
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert "sdpa -> lctrain_dual_chunk" in done.stderr


def test_the_guide_s_yaml_builds(tmp_path, monkeypatch):
    """Builds the guide's YAML with LightningCLI, called as the guide calls it."""
    from lightning.pytorch.cli import LightningCLI

    guide = (ROOT / "docs" / "guides" / "lightning.md").read_text()
    (tmp_path / "config.yaml").write_text(guide.split("```yaml\n")[1].split("```")[0])
    (tmp_path / "book.txt").write_text("Some words of a book. " * 50)
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", "config.yaml", "--trainer.accelerator", "cpu"]
    cli = LightningCLI(
        lctrain.LongContextModule,
        lctrain.PackedDataModule,
        args=arguments,
        run=False,
        save_config_callback=None,
    )
    assert isinstance(cli.datamodule.preparation.source, data.TextSource)
    assert any(isinstance(one, callbacks.PatchAttention) for one in cli.trainer.callbacks)
    assert cli.model.optim.learning_rate == 0.001
