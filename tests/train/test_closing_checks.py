"""Tests that a model for the closing passkey test is checked before training."""

import json
import shutil
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lctrain import closing
from lctrain.closing_checks import CheckClosing, check_closing
from lctrain.config import EvaluationConfig
from lctrain.eval.shipped import FOLDER
from lctrain.train import train
from tests.train.runs import config


@pytest.fixture
def reader(tmp_path):
    """A copy of the shipped model."""
    return shutil.copytree(FOLDER, tmp_path / "reader")


def settings_of(reader, methods=("plain",), lengths=(64,)):
    return EvaluationConfig(
        methods=list(methods), passkey_lengths=list(lengths), passkey_model=str(reader)
    )


def cut_short(reader):
    path = reader / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def without_weights(reader):
    (reader / "model.safetensors").unlink()


def of_other_shapes(reader):
    set_in_config(reader, intermediate_size=24)


def with_a_wrong_config(reader):
    set_in_config(reader, max_position_embeddings=None)


def with_scaled_rope(reader):
    set_in_config(
        reader,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    )


def set_in_config(reader, **values):
    path = reader / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replace(reader, positions, vocabulary):
    """Replaces the model by one that looks positions up in a table, and has no RoPE."""
    sizes = {"n_positions": positions, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes)).save_pretrained(reader)


def without_rope(reader):
    replace(reader, 128, len(AutoTokenizer.from_pretrained(reader)))


def with_few_positions(reader):
    replace(reader, 48, len(AutoTokenizer.from_pretrained(reader)))


def with_few_embeddings(reader):
    replace(reader, 128, 50)


@pytest.mark.parametrize(
    ("damage", "method", "message"),
    [
        (cut_short, "plain", "model must hold intact weights"),
        (without_weights, "plain", "model must be a folder or a name on the Hugging Face hub"),
        (of_other_shapes, "plain", "model must hold intact weights of the shapes in its config"),
        (with_a_wrong_config, "plain", "Validation error for field 'max_position_embeddings'"),
        (with_scaled_rope, "yarn", "methods must not name yarn for .*of the type 'linear' already"),
        (without_rope, "ntk", "methods must not name ntk for GPT2LMHeadModel, which has not one"),
        (without_rope, "dual_chunk", "GPT2"),
        (with_few_positions, "plain", "passkey_lengths must be at most 48, the number of"),
        (with_few_embeddings, "plain", "model must have an embedding for each of its tokenizer's"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_reader_that_cannot_be_used(reader, damage, method, message):
    damage(reader)
    beginning = "^evaluation.passkey_model must be a model that the passkey test can use, got "
    with pytest.raises(ValueError, match=f"(?s){beginning}{reader}: .*{message}"):
        check_closing(settings_of(reader, [method]), AutoTokenizer.from_pretrained(FOLDER))


def test_an_intact_reader_passes(reader):
    methods = ["plain", "linear", "ntk", "yarn", "dual_chunk", "dual_chunk_yarn", "intra_chunk"]
    check_closing(settings_of(reader, methods), AutoTokenizer.from_pretrained(FOLDER))


def test_a_reader_is_loaded_once_for_all_stages(reader, monkeypatch):
    checked = []
    monkeypatch.setattr(
        "lctrain.closing_checks.check_closing", lambda *given: checked.append(given)
    )
    callback = CheckClosing(settings_of(reader))
    trainer = SimpleNamespace(datamodule=SimpleNamespace(tokenizer="the data's"))
    for stage in ("validate", "fit", "validate"):
        callback.setup(trainer, None, stage)
    assert checked == [(callback.config, "the data's")]


def test_a_damaged_reader_is_found_before_the_first_step(reader, tiny, tmp_path):
    cut_short(reader)
    settings = [
        "evaluation.methods=[plain]",
        "evaluation.passkey_lengths=[64]",
        f"evaluation.passkey_model={reader}",
    ]
    with pytest.raises(ValueError, match="model must hold intact weights"):
        train(config(*tiny, *settings, output_dir=tmp_path / "1"))
    assert not [*tmp_path.rglob("*.ckpt")]
    assert not (tmp_path / "1" / "metrics.csv").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_shows_progress_and_writes(monkeypatch, tmp_path, rank):
    """All ranks of a sharded model evaluate it."""
    shown = []

    class Table:
        rows = ()

        def save(self, folder):
            folder.mkdir()
            return {"csv": folder / "a.csv", "png": folder / "a.png"}

    def measure(*args, progress, **options):
        shown.append(progress)
        return Table()

    monkeypatch.setattr(closing, "perplexity_by_length", measure)
    monkeypatch.setattr(closing, "context_gain", lambda rows: "")
    monkeypatch.setattr(closing, "begin_tokens", lambda *args: [])
    trainer = SimpleNamespace(
        global_rank=rank,
        world_size=2,
        progress_bar_callback=object(),
        datamodule=SimpleNamespace(tokenizer=None),
        loggers=(),
    )
    found = closing.measure_as_trained(
        EvaluationConfig(), [], trainer, SimpleNamespace(model=None, task="causal"), tmp_path
    )
    assert shown == [rank == 0]
    assert (tmp_path / "perplexity").exists() == (rank == 0)
    assert set(found.paths) == ({"perplexity table", "perplexity plot"} if rank == 0 else set())
