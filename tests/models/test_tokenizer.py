"""Tests which tokenizer a pretrained model uses: its own, one with equal ids, or any by option."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lctrain.build import build_datamodule
from lctrain.config import PretrainedModelConfig, ScratchModelConfig
from lctrain.models.tokenizer import tokenizer_for
from lctrain.schemas import TextData

TOKENS = ["<end>", "a", "b", "c"]


def save_tokenizer(folder, tokens, **options) -> str:
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, "a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(tmp_path) -> PretrainedModelConfig:
    folder = save_tokenizer(tmp_path / "model", TOKENS)
    LlamaConfig().save_pretrained(folder)
    return PretrainedModelConfig(name_or_path=folder)


def test_the_default_is_the_models_own(model, tmp_path):
    own = tokenizer_for(model, None)
    assert own.get_vocab() == {token: index for index, token in enumerate(TOKENS)}
    data = build_datamodule(TextData(files=("x",), cache_dir=str(tmp_path)), model)
    assert data.preparation.given_tokenizer().get_vocab() == own.get_vocab()
    assert tokenizer_for(ScratchModelConfig(model_type="llama"), None) is None
    assert tokenizer_for(ScratchModelConfig(model_type="llama"), "x") == "x"


def test_a_tokenizer_with_the_same_ids_may_be_named(model, tmp_path):
    copy = save_tokenizer(tmp_path / "copy", TOKENS)
    more = save_tokenizer(tmp_path / "more", [*TOKENS, "d"])
    assert len(tokenizer_for(model, copy)) == 4
    assert len(tokenizer_for(model, more)) == 5


def test_other_ids_are_an_error_unless_they_are_asked_for(model, tmp_path, caplog):
    other = save_tokenizer(tmp_path / "other", ["<end>", "b", "a", "c"])
    with pytest.raises(ValueError, match=r"must be the model's own, got .*other.*allow_other_tok"):
        tokenizer_for(model, other)
    allowed = PretrainedModelConfig(name_or_path=model.name_or_path, allow_other_tokenizer=True)
    assert tokenizer_for(allowed, other).get_vocab()["b"] == 1
    assert "goes on with the ids of another tokenizer" in caplog.text


def test_a_model_without_a_tokenizer_needs_one_by_name(tmp_path, caplog):
    LlamaConfig().save_pretrained(tmp_path / "bare")
    bare = PretrainedModelConfig(name_or_path=str(tmp_path / "bare"))
    with pytest.raises(ValueError, match=r"data\.tokenizer must name the tokenizer that .*bare"):
        tokenizer_for(bare, None)
    assert len(tokenizer_for(bare, save_tokenizer(tmp_path / "named", TOKENS))) == 4
    assert "cannot be checked" in caplog.text


def test_revision_and_trust_reach_the_tokenizer(monkeypatch):
    seen = {}

    def from_pretrained(name, **options):
        seen.update(options, name=name)
        raise OSError("not there")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    config = PretrainedModelConfig(name_or_path="o/m", revision="v1", trust_remote_code=True)
    with pytest.raises(ValueError, match="not there"):
        tokenizer_for(config, None)
    assert seen == {"name": "o/m", "revision": "v1", "trust_remote_code": True}


def test_code_of_a_tokenizer_runs_only_if_it_is_trusted(tmp_path):
    folder = tmp_path / "model"
    save_tokenizer(folder, TOKENS)
    LlamaConfig().save_pretrained(folder)
    (folder / "mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class Mine(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "tokenizer_class": "Mine",
        "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]},
    }
    path.write_text(json.dumps(settings))
    trusted = PretrainedModelConfig(name_or_path=str(folder), trust_remote_code=True)
    assert type(tokenizer_for(trusted, None)).__name__ == "Mine"
