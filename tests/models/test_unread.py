"""Tests which pretrained models are left unread until they are sharded, and the others' reasons."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lctrain.config import PretrainedModelConfig
from lctrain.distributed.sharding import built_to_be_sharded, parameters_on_meta
from lctrain.distributed.stored import stored_of
from lctrain.models.pretrained import load_pretrained
from lctrain.models.unread import safetensors_files


def load(folder, dtype="float32", is_first=True, **options):
    config = PretrainedModelConfig(name_or_path=str(folder))
    with built_to_be_sharded(is_first):
        return load_pretrained(config, dtype, **options)


def change(folder, weights=None, **settings):
    """Adds weights to a model's file, and settings to its configuration."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | (weights or {}), path, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture
def folder(make_llama, tmp_path):
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("is_first", [True, False])
def test_every_parameter_knows_its_place(folder, is_first):
    model = load(folder, is_first=is_first)
    stored = load_file(folder / "model.safetensors")
    places = {stored_of(parameter).name for parameter in model.parameters()}
    assert places == set(stored)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_weight_may_have_either_name(folder):
    path = folder / "model.safetensors"
    stored = load_file(path)
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, path, metadata={"format": "pt"})
    assert stored_of(load(folder).model.embed_tokens.weight).name == "lm_head.weight"


def test_stored_buffers_are_read(folder, monkeypatch):
    """The buffer of the model's class is kept in files, and holds another value there."""
    from transformers import LlamaForCausalLM

    built = LlamaForCausalLM.__init__

    def with_buffer(self, config):
        built(self, config)
        self.register_buffer("scale", torch.ones(2))

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_buffer)
    change(folder, {"scale": torch.tensor([3.0, 4.0], dtype=torch.bfloat16)})
    assert torch.equal(load(folder).scale, torch.tensor([3.0, 4.0]))


def test_weights_that_the_model_does_not_have_are_named(folder, caplog):
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}
    change(folder, old)
    assert load(folder).lm_head.weight.is_meta
    assert not caplog.messages
    change(folder, {"other.weight": torch.ones(1), "more.weight": torch.ones(1)})
    assert load(folder).lm_head.weight.is_meta
    (message,) = caplog.messages
    assert f"{folder} holds 2 weights that LlamaForCausalLM does not have, more.we" in message


def test_an_index_that_names_a_missing_weight(folder):
    places = dict.fromkeys(load_file(folder / "model.safetensors"), "part.safetensors")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert load(folder).lm_head.weight.is_meta
    index.write_text(json.dumps({"weight_map": places | {"lost.weight": "part.safetensors"}}))
    with pytest.raises(ValueError, match=r"part.safetensors does not hold lost.weight, which its"):
        load(folder)


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def tied_twice(folder):
    weights = load_file(folder / "model.safetensors")
    change(folder, {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})


def of_experts(folder):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 1, "vocab_size": 9}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts))
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (as_pickle, "its weights are not in safetensors files"),
        (tied_twice, "it stores the tied weight model.embed_tokens.weight twice"),
        (of_experts, "its weight model.layers.0.mlp.experts.down_proj is made from several stored"),
    ],
)
def test_other_models_are_loaded_by_the_first_rank(folder, caplog, make, reason):
    make(folder)
    caplog.set_level("INFO", "lctrain.models.pretrained")
    model = load(folder)
    assert f"Rank 0 loads all weights of {folder}: {reason}" in caplog.text
    assert not any(parameter.is_meta for parameter in model.parameters())
    whole = load_pretrained(PretrainedModelConfig(name_or_path=str(folder)), "float32")
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert all(parameter.is_meta for parameter in load(folder, is_first=False).parameters())


def test_weights_that_adapters_are_added_to_are_loaded_by_the_first_rank(folder):
    assert not load(folder, is_whole=True).lm_head.weight.is_meta


def test_weights_of_several_dtypes_are_loaded_by_the_first_rank(folder, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["norm"])
    assert load(folder, "bfloat16").model.norm.weight.dtype == torch.float32
    assert load(folder, "float32").model.norm.weight.is_meta


def test_models_that_are_not_sharded_are_loaded_as_before(folder):
    config = PretrainedModelConfig(name_or_path=str(folder))
    assert not load_pretrained(config).lm_head.weight.is_meta
    with parameters_on_meta():
        assert stored_of(load_pretrained(config).lm_head.weight) is None


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_an_error(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(RuntimeError, match=r"index\.json does not name the file of every weight"):
        safetensors_files(str(tmp_path), None)
