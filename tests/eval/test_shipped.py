"""Tests the small model in the wheel: dual chunk attention finds its keys, plain RoPE does not."""

import json
import sys

import numpy as np
import pytest
import torch

import lctrain
from lctrain.data.passkey import PasskeyFormat
from lctrain.eval import (
    Extension,
    Run,
    Subject,
    computed,
    passkey_retrieval,
    trained_window,
)
from lctrain.eval.shipped import FOLDER, SHIPPED, load_passkey_model, passkey_folder
from lctrain.eval.tasks.passkey import PasskeyRetrieval
from lctrain.generation.pages import CacheShape
from lctrain.generation.road import find_cache
from tests.house.typecheck import ROOT

TEXT = (ROOT / "LICENSE").read_text()  # hides the keys; it never changes
RECORD = json.loads((ROOT / "recipes" / "passkey_model" / "results" / "train.json").read_text())
DEPTHS = (0.0, 0.5)
KEYS = 3


@pytest.fixture(scope="module")
def table():
    """Keys found at one and at eight windows."""
    reader = load_passkey_model(SHIPPED)
    window = trained_window(reader.model, None)
    return passkey_retrieval(
        reader.model,
        PasskeyFormat.of(reader.tokenizer),
        [np.array(reader.tokenizer(TEXT, verbose=False)["input_ids"])],
        [window, 8 * window],
        [Extension(method, window) for method in ("plain", "dual_chunk")],
        max_tokens=8 * window,
        depths=DEPTHS,
        keys_per_cell=KEYS,
        name=reader.name,
    )


def test_every_method_finds_the_keys_inside_the_window(table):
    for method in ("plain", "dual_chunk"):
        assert table.found[method][0].sum() >= len(DEPTHS) * KEYS - 1  # a near tie may tip


def test_only_dual_chunk_attention_finds_them_at_eight_windows(table):
    assert table.found["dual_chunk"][1].sum() >= len(DEPTHS) * KEYS - 1
    assert table.found["plain"][1].sum() <= 1


def test_decoding_writes_the_keys_at_eight_windows(monkeypatch):
    """passkey.by=generation, over a paged cache; equal beginnings of texts are read once."""
    module, sharing = sys.modules["lctrain.eval.generate"], []

    def always(model, prompts, **options):
        sharing.append(find_cache(model))
        return lctrain.generate(model, prompts, **options, shared_prefixes="always")

    monkeypatch.setattr(module, "generate", always)
    reader = load_passkey_model(SHIPPED)
    window = trained_window(reader.model, None)
    form = PasskeyFormat.of(reader.tokenizer)
    task = PasskeyRetrieval(depths=DEPTHS, keys_per_cell=KEYS, format=form, by="generation")
    task.texts = [np.array(reader.tokenizer(TEXT, verbose=False)["input_ids"])]
    subject = Subject(reader.model, reader.tokenizer, window=window, name=reader.name)
    run = Run.prepared(
        task,
        subject,
        [Extension("dual_chunk", window)],
        [8 * window],
        max_tokens=8 * window,
    )
    found = task.table(computed(run, False)).found["dual_chunk"]
    assert isinstance(sharing[0], CacheShape)
    assert found.sum() >= len(DEPTHS) * KEYS - 1  # a near tie may tip


def test_the_heatmap_says_which_model_found_the_keys(table, tmp_path):
    assert table.name == "lctrain's shipped model, trained on passkeys only"
    assert table.name in str(table)
    assert json.loads(table.save(tmp_path)["json"].read_text())["name"] == table.name


def test_the_model_is_the_one_of_the_record():
    reader = load_passkey_model(SHIPPED)
    assert reader.model.num_parameters() == RECORD["parameters"]
    assert trained_window(reader.model, None) == RECORD["window"]
    assert len(reader.tokenizer) == RECORD["vocabulary"]
    assert len(PasskeyFormat.of(reader.tokenizer).words) == RECORD["key_words"]
    assert all(weight.dtype == torch.float32 for weight in reader.model.parameters())


def test_the_folder_is_small_and_holds_no_code():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 400_000


def test_other_names_are_left_alone():
    assert passkey_folder("org/model") == "org/model"
    assert passkey_folder(SHIPPED) == str(FOLDER)
    with pytest.raises(ValueError, match="model must be a folder or a name on the Hugging Face"):
        load_passkey_model("./nowhere")
