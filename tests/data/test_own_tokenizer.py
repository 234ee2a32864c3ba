"""Tests that pretrained weights never meet the ids of another tokenizer without a word."""

import re
import shutil

import lightning.pytorch as pl
import peft
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from lctrain.callbacks import PatchAttention
from lctrain.data import PackedDataModule, TextSource, pack
from lctrain.module import LongContextModule
from tests.callbacks.own_module import OwnModule
from tests.training import make_trainer

REFUSED = r"tokenizer must be the one that the weights of .*pretrained.* got none: .* tokenizer='.*"


@pytest.fixture(scope="module")
def tokenizer(request):
    """The tokenizer that a data module trains on the corpus."""
    cache, corpus = (request.getfixturevalue(name) for name in ("cache_dir", "corpus"))
    source = TextSource(files=(f"{corpus}/*.txt",))
    data = PackedDataModule(source, max_tokens=256, vocab_size=300, cache_dir=cache)
    data.setup()
    return data.tokenizer


@pytest.fixture
def pretrained(make_llama, tokenizer, tmp_path):
    """A folder with a model and its tokenizer."""
    folder = str(tmp_path / "pretrained")
    make_llama(vocab_size=300).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


MODULES = {
    "name": LongContextModule,
    "loaded": lambda folder: LongContextModule(AutoModelForCausalLM.from_pretrained(folder)),
    "adapters": lambda folder: LongContextModule(adapted(folder)),
    "function": lambda folder: LongContextModule(
        lambda data: AutoModelForCausalLM.from_pretrained(folder)
    ),
    "own-module": lambda folder: OwnModule(AutoModelForCausalLM.from_pretrained(folder)),
}


def fit(tmp_path, module, data, run="fit"):
    callbacks = [PatchAttention()] if isinstance(module, OwnModule) else []
    trainer = make_trainer(tmp_path, callbacks, max_steps=1)
    getattr(trainer, run)(module, datamodule=data)
    return trainer


@pytest.mark.parametrize("kind", MODULES)
def test_no_tokenizer_is_trained_for_pretrained_weights(kind, pretrained, tmp_path, make_data):
    with pytest.raises(ValueError, match=REFUSED):
        fit(tmp_path, MODULES[kind](pretrained), make_data())
    trainer = fit(tmp_path, MODULES[kind](pretrained), make_data(tokenizer=pretrained))
    assert trainer.global_step == 1


def test_the_error_comes_before_the_data_are_read(pretrained, tmp_path, make_data, monkeypatch):
    data = make_data()
    monkeypatch.setattr(type(data.preparation), "run", lambda self: pytest.fail("data were read"))
    for run in ("fit", "validate", "test"):
        with pytest.raises(ValueError, match=REFUSED):
            fit(tmp_path, LongContextModule(pretrained), data, run)


def test_random_weights_may_have_a_new_tokenizer(pretrained, make_llama, tmp_path, make_data):
    """A config that was loaded says nothing of the weights."""
    architecture = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(pretrained))
    for model in (architecture, make_llama(vocab_size=300), make_llama(vocab_size=300).config):
        source = model if hasattr(model, "parameters") else model.to_dict()
        assert fit(tmp_path, LongContextModule(source), make_data()).global_step == 1


OTHER = "ids mean other tokens than those that .*pretrained was trained on. Pass tokenizer='"


@pytest.fixture
def other(make_data, tmp_path):
    """Returns a tokenizer, one of whose ids means another token; it is also saved in `other`."""
    data = make_data(vocab_size=270)
    data.setup()
    data.tokenizer.add_tokens(["alpha beta"])
    data.tokenizer.save_pretrained(tmp_path / "other")
    return data.tokenizer


@pytest.mark.parametrize("form", ["name", "object", "token-ids", "packed-rows"])
def test_another_tokenizer_is_named_in_a_warning(
    form, pretrained, other, tokenizer, tmp_path, make_data, caplog
):
    documents = [tokenizer(text)["input_ids"] for text in ["alpha beta " * 30] * 4]
    given = {
        "name": {"tokenizer": str(tmp_path / "other")},
        "object": {"tokenizer": other},
        "token-ids": {"tokenizer": other, "source": documents},
        "packed-rows": {"tokenizer": other, "source": pack(documents, 256)},
    }[form]
    fit(tmp_path, LongContextModule(pretrained), make_data(**given))
    assert re.search(OTHER, caplog.text)


@pytest.mark.parametrize("form", ["own", "copy", "untold", "unknown"])
def test_no_warning_where_ids_agree_or_nothing_is_known(
    form, pretrained, tokenizer, tmp_path, make_data, caplog
):
    documents = [tokenizer(text)["input_ids"] for text in ["alpha beta " * 30] * 4]
    given = {"tokenizer": tokenizer}
    if form == "copy":
        given = {"tokenizer": shutil.copytree(pretrained, tmp_path / "copy")}
    if form == "untold":
        given = {"source": pack(documents, 256)}
    if form == "unknown":
        (tmp_path / "pretrained" / "tokenizer.json").unlink()
        (tmp_path / "pretrained" / "tokenizer_config.json").unlink()
    fit(tmp_path, LongContextModule(pretrained), make_data(**given))
    assert "mean other tokens" not in caplog.text


def test_a_module_of_any_kind_is_accepted():
    from lctrain.data.own_tokenizer import pretrained_name

    assert pretrained_name(None) is None
    assert pretrained_name(pl.LightningModule()) is None
