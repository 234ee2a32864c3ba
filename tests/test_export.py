"""Tests exports: the config, the model card, and unchanged outputs."""

import json
import warnings

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from lctrain import patch_model
from lctrain.attention import make_spec
from lctrain.config import AdapterConfig, AttentionConfig
from lctrain.data.documents import read_documents
from lctrain.data.tokenizer import train_tokenizer
from lctrain.export import export_model, exported_config
from lctrain.model_names import public_name
from lctrain.models.differential import to_differential
from lctrain.models.dual_chunk import follow_window
from lctrain.models.low_rank import add_adapter
from lctrain.module import LongContextModule

IDS = torch.arange(3, 43)[None] % 97


def llama(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    return LlamaConfig(**{**sizes, **changes})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> PreTrainedTokenizerFast:
    from datasets import Dataset

    documents = read_documents(Dataset.from_dict({"text": ["a text"]}), "t")
    return train_tokenizer(documents, 260, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def export(tokenizer, tmp_path):
    """Returns a function that exports a model, and returns (folder, config.json, card)."""

    def run(model, attention: AttentionConfig | None, length: int | None = 128):
        module = LongContextModule(model, attention=attention)
        module.configure_model()
        folder = export_model(module, tokenizer, tmp_path / "model", length)
        config = json.loads((folder / "config.json").read_text())
        return folder, config, (folder / "README.md").read_text()

    return run


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_a_plain_export_states_the_trained_length(export):
    model = AutoModelForCausalLM.from_config(llama())
    before = logits(model)
    folder, config, card = export(model, AttentionConfig())
    assert config["max_position_embeddings"] == 128
    assert config["trained_as"]["trained_length"] == 128
    assert config["trained_as"]["attention"]["name"] == "flash"
    assert model.config.max_position_embeddings == 2048  # of the model in memory
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded), before)
    for words in ("library_name: transformers", "128 tokens", "without lctrain", "`llama`"):
        assert words in card


def test_a_pretrained_model_keeps_a_longer_window_and_gets_a_longer_one(export, tmp_path):
    AutoModelForCausalLM.from_config(llama()).save_pretrained(tmp_path / "base")
    for length, stated in ((128, 2048), (4096, 4096)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        _, config, card = export(model, AttentionConfig(), length)
        assert config["max_position_embeddings"] == stated
        assert f"{length:,} tokens" in card


def test_dual_chunk_is_in_the_config_and_gives_the_same_attention_again(export):
    model = AutoModelForCausalLM.from_config(llama(max_position_embeddings=32))
    attention = AttentionConfig(name="dual_chunk", chunk_size=15, local_size=4, scale="yarn")
    with patch_model(model, "dual_chunk", **attention.options()):
        before = logits(model)
    folder, config, card = export(model, attention)
    sizes = {"chunk_size": 15, "local_size": 4, "original_max_position_embeddings": 32}
    assert config["dual_chunk_attention_config"] == sizes
    assert config["trained_as"]["attention"]["scale"] == "yarn"
    again = follow_window(AutoConfig.from_pretrained(folder), make_spec("dual_chunk"))
    assert (again.chunk_size, again.local_size, again.window) == (15, 4, 32)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    options = {"scale": "yarn", "scale_coefficient": 0.1}
    assert 'lctrain.patch_model(model, "dual_chunk", scale="yarn", scale_coefficient=0.1)' in card
    with patch_model(loaded, "dual_chunk", **options):
        assert torch.equal(logits(loaded), before)
    assert "texts of up to 15 tokens" in card


def test_a_merged_export_replaces_adapters_in_the_same_folder(tokenizer, tmp_path):
    pytest.importorskip("peft")
    AutoModelForCausalLM.from_config(llama()).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    module = LongContextModule(add_adapter(base, AdapterConfig(rank=2)), attention=None)
    folder = export_model(module, tokenizer, tmp_path / "model")
    assert (folder / "adapter_config.json").exists()
    export_model(module, tokenizer, folder, merge=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    assert (folder / "config.json").exists()


@pytest.mark.parametrize("made_by", ["lctrain", "peft"])
def test_adapters_of_a_relative_base_load_from_another_folder(
    tokenizer, tmp_path, monkeypatch, made_by
):
    peft = pytest.importorskip("peft")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    AutoModelForCausalLM.from_config(llama()).save_pretrained("models/base")
    base = AutoModelForCausalLM.from_pretrained("models/base")
    if made_by == "lctrain":
        model = add_adapter(base, AdapterConfig(rank=2))
        monkeypatch.chdir("elsewhere")  # before the export
    else:
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = logits(model)
    module = LongContextModule(model, attention=None)
    folder = export_model(module, tokenizer, tmp_path / "adapters")
    monkeypatch.chdir(tmp_path / "elsewhere")
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "models" / "base")
    assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(folder)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    card = (folder / "README.md").read_text()
    assert "base_model:" not in card  # a folder is no name on the hub
    assert "needs PEFT and the base model, whose folder `adapter_config.json` names" in card
    assert "AutoPeftModelForCausalLM" in card
    assert files_that_name(tmp_path, folder) == ["adapter_config.json"]  # to load it here


def files_that_name(place, folder):
    """Returns the names of a folder's text files that contain a path of this machine."""
    texts = (path for path in folder.iterdir() if path.suffix in (".json", ".md", ".jinja"))
    return [path.name for path in texts if str(place) in path.read_text(encoding="utf-8")]


def test_no_exported_file_names_the_folder_of_the_base_model(export, tokenizer, tmp_path):
    AutoModelForCausalLM.from_config(llama()).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    read = AutoTokenizer.from_pretrained(tmp_path / "base")
    folder = export_model(LongContextModule(model, attention=None), read, tmp_path / "model")
    assert files_that_name(tmp_path, folder) == []
    assert "trained from" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "public"),
    [
        ("owner/name", "owner/name"),
        ("gpt2", "gpt2"),
        ("/cache/hub/models--owner--a-name.1/snapshots/0f3c", "owner/a-name.1"),
        ("/cache/hub/models--gpt2/snapshots/0f3c/", "gpt2"),
        ("C:\\cache\\models--owner--name\\snapshots\\0f3c", "owner/name"),
        ("/models/base", ""),
        ("~/base", ""),
        ("../base", ""),
        ("tests", ""),
        ("", ""),
    ],
)
def test_a_base_model_is_named_as_others_know_it(export, given, public):
    assert public_name(given) == public
    model = AutoModelForCausalLM.from_config(llama())
    model.config._name_or_path = given
    _, _, card = export(model, None)
    assert ("trained from" in card) == (public != "")
    assert (f"trained from: `{public}`" in card) == (public != "")
    assert ("base_model: " in card) == ("/" in public)


@pytest.mark.parametrize("name", ["owner/name", None])
def test_adapters_keep_a_name_on_the_hub(tokenizer, tmp_path, name):
    pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_config(llama())
    base.name_or_path = base.config._name_or_path = name or ""
    module = LongContextModule(add_adapter(base, AdapterConfig(rank=2)), attention=None)
    folder = export_model(module, tokenizer, tmp_path / "model")
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == name
    assert ("base_model: owner/name" in (folder / "README.md").read_text()) == (name is not None)


def test_adapters_replace_a_whole_model_of_an_earlier_export_only(tokenizer, tmp_path):
    pytest.importorskip("peft")
    AutoModelForCausalLM.from_config(llama()).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    folder = tmp_path / "model"
    export_model(LongContextModule(base, attention=None), tokenizer, folder)
    module = LongContextModule(add_adapter(base, AdapterConfig(rank=2)), attention=None)
    export_model(module, tokenizer, folder)
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not names & {"config.json", "model.safetensors", "generation_config.json"}
    export_model(module, tokenizer, tmp_path / "base")  # whose weights the adapters need
    assert (tmp_path / "base" / "model.safetensors").exists()


def test_an_export_leaves_fused_modules_and_tiles_as_they_were(tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_config(llama())
    attention = AttentionConfig(fused=True)
    memory = {"name": "checkpoint", "mlp_tokens": 8}
    module = LongContextModule(model, attention=attention, memory=memory)
    module.configure_model()
    before = [type(part) for part in model.modules()]
    tiles = [layer.mlp.forward for layer in model.model.layers]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_model(module, tokenizer, tmp_path / "model")
    assert [type(part) for part in model.modules()] == before
    assert [layer.mlp.forward for layer in model.model.layers] == tiles
    module.patch_handle.unpatch()
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"


@pytest.mark.parametrize("version", [1, 2])
def test_differential_exports_name_their_version_and_what_loads_them(export, version):
    if version == 1:
        sizes = {key: getattr(llama(), key) for key in ("vocab_size", "hidden_size",
                 "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings")}  # fmt: skip
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("diffllama", **sizes))
    else:
        model = to_differential(AutoModelForCausalLM.from_config(llama()))
    folder, config, card = export(model, AttentionConfig(name="differential"))
    assert config["trained_as"]["differential_version"] == version
    assert ("import lctrain" in card) == (version == 2)
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "stated"),
    [
        (GPT2Config(n_positions=512), 512),
        (llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), 2048),
        (llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), 128),
        (Gemma3TextConfig(max_position_embeddings=4096), 128),
    ],
    ids=["learned-positions", "dynamic", "linear", "rope-per-layer"],
)
def test_the_length_is_stated_where_outputs_do_not_depend_on_it(config, stated):
    exported = exported_config(config, make_spec("flash"), 128)
    assert exported.max_position_embeddings == stated
    assert exported.trained_as["trained_length"] == 128
    assert exported_config(config, None, None).trained_as["attention"] is None


def test_a_leading_tilde_is_the_home_folder(tokenizer, tmp_path, monkeypatch):
    """The Python function treats `~` as the options of a run do."""
    from lctrain.callbacks import StepCheckpoint
    from lctrain.loggers import MetricsCSV

    monkeypatch.setenv("HOME", str(tmp_path))
    module = LongContextModule(AutoModelForCausalLM.from_config(llama()))
    module.configure_model()
    assert export_model(module, tokenizer, "~/mine") == tmp_path / "mine"
    assert (tmp_path / "mine" / "model.safetensors").exists()
    assert LongContextModule("~/mine")._build().config.vocab_size == 300
    assert StepCheckpoint("~/runs").directory == tmp_path / "runs"
    assert MetricsCSV("~/runs").path == tmp_path / "runs" / "metrics.csv"
