"""Tests which models a configuration can describe, and which ones are refused."""

import pytest

from lctrain.build import (
    build_model,
    check_model,
)
from lctrain.config import (
    AttentionConfig,
    PretrainedModelConfig,
    ScratchModelConfig,
)
from tests.configs.composed import load


@pytest.mark.parametrize("name", ["llama_5m", "tiny"])
def test_models_build(name):
    config = load(f"model={name}")
    model = build_model(config.model, 8192)
    assert model.training
    assert model.config.vocab_size == 8192
    if name == "llama_5m":
        assert 4.5e6 < sum(p.numel() for p in model.parameters()) < 5.5e6


def number_of_parameters(*overrides):
    import torch

    config = load(*overrides)
    check_model(config.model, config.attention)
    with torch.device("meta"):
        model = build_model(config.model, 8192)
    return sum(p.numel() for p in model.parameters())


def test_differential_models_build_with_as_many_parameters_as_the_plain_one():
    plain = number_of_parameters("model=llama_5m")
    lambdas = 4 * 4 * 64  # layers, vectors, head dim
    assert number_of_parameters("model=diff_llama", "attention=differential") == plain + lambdas
    second = ("model=llama_diff_v2", "attention=differential")
    queries = 4 * (256 * 256 + 256 * 4)  # layers, the second queries, the projection of lambda
    assert number_of_parameters(*second) == plain + queries
    narrower = number_of_parameters(*second, "model.config.intermediate_size=616")
    assert 1000 * abs(narrower - plain) < plain


def test_version_2_of_other_families():
    config = load("model=llama_diff_v2", "model.model_type=qwen3")
    assert type(build_model(config.model, 300)).__name__ == "Qwen3DifferentialForCausalLM"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model=llama_diff_v2", "model.differential=1"), "must be 2 or null, got 1. .*diff_llama"),
        (("model=llama_diff_v2", "model.model_type=gemma2"), "one of the families llama.*got gemm"),
        (("model=llama_5m", "attention=differential"), "differential attention layers .*got Llama"),
        (("model=diff_llama", "attention=dual_chunk"), "must not be differential for .*dual_chunk"),
        (("model=llama_diff_v2", "attention=dual_chunk"), "must not be differential for attention"),
    ],
)
def test_differential_configs_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        number_of_parameters(*overrides)


def test_the_recipe_has_about_100_million_parameters():
    import torch

    config = load("experiment=llama_100m_32k")
    with torch.device("meta"):
        model = build_model(config.model, config.data.vocab_size)
    assert 0.95e8 < sum(p.numel() for p in model.parameters()) < 1.05e8
    assert config.data.max_tokens == 32768


def test_the_model_of_the_recipe_beyond_the_window_fits_60_mb_in_half_precision():
    import torch

    config = load("experiment=dual_chunk_extension")
    with torch.device("meta"):
        model = build_model(config.model, config.data.vocab_size)
    assert 2.5e7 < sum(p.numel() for p in model.parameters()) < 3e7
    assert config.data.max_document_tokens == model.config.max_position_embeddings == 1024


def test_unknown_model_family():
    config = load("model.model_type=lama")
    with pytest.raises(ValueError, match=r"must be a family of transformers, got 'lama'"):
        build_model(config.model, 300)


def test_unknown_model_argument():
    config = load("+model.config.hidden=3")
    with pytest.raises(ValueError, match=r"model.config.hidden must be an argument of LlamaConfig"):
        build_model(config.model, 300)


def test_wrong_model_argument_type():
    with pytest.raises(ValueError, match=r"model.config.hidden_size must be an integer .* 'wide'"):
        load("model.config.hidden_size=wide")
    config = load("+model.config.rope_parameters=wide")
    with pytest.raises(ValueError, match=r"(?s)model.config must fit LlamaConfig.*rope_parameters"):
        build_model(config.model, 300)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "mixtral", "gpt2"]
)
def test_full_sized_models_are_checked_without_memory(family):
    """Special token ids may exceed a small tokenizer's vocabulary, as in phi3."""
    check_model(ScratchModelConfig(model_type=family), AttentionConfig())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral"])
def test_full_sized_models_are_checked_for_dual_chunk_attention(family):
    check_model(ScratchModelConfig(model_type=family), load("attention=dual_chunk").attention)


def test_a_full_sized_model_that_cannot_have_dual_chunk_attention():
    config = load("attention=dual_chunk")
    with pytest.raises(ValueError, match="got a sliding window in MistralAttention"):
        check_model(ScratchModelConfig(model_type="mistral"), config.attention)


def test_ranks_that_cannot_share_the_heads_of_a_model_are_refused_before_the_data():
    options = ["trainer.strategy=fsdp2", "trainer.devices=4", "trainer.context_parallel=4"]
    config = load("model=tiny", *options, "trainer.context_exchange=heads")
    with pytest.raises(ValueError, match=r"must divide the key/value heads .*got 4 ranks and 2 "):
        check_model(config.model, config.attention, trainer=config.trainer)
    config = load("model=tiny", *options)
    check_model(config.model, config.attention, trainer=config.trainer)


@pytest.mark.parametrize("option", ["chunk_size", "local_size", "scale_coefficient", "window"])
def test_options_of_another_kind_are_named(option):
    config = load("attention=flash", f"attention.{option}=64")
    message = f"got {option}. It belongs to attention='dual_chunk'"
    with pytest.raises(ValueError, match=message):
        check_model(config.model, config.attention)


def test_pretrained_models_are_checked_without_their_weights(tmp_path):
    model = build_model(load("model=tiny").model, 300)
    model.config.save_pretrained(tmp_path)
    check_model(PretrainedModelConfig(name_or_path=str(tmp_path)), AttentionConfig())


@pytest.mark.parametrize(
    ("family", "method", "message"),
    [
        (
            "gpt2",
            "yarn",
            "methods must not name yarn for GPT2LMHeadModel, which has not one rotary",
        ),
        ("mistral", "dual_chunk", "got a sliding window in MistralAttention"),
        ("bloom", "plain", "methods must be empty for BloomForCausalLM, whose config does not say"),
    ],
)
def test_methods_of_the_closing_evaluation_are_checked_before_training(family, method, message):
    beginning = (
        rf"^evaluation.methods must be methods that the model supports, got \['{method}'\]: "
    )
    with pytest.raises(ValueError, match=f"{beginning}.*{message}"):
        check_model(ScratchModelConfig(model_type=family), None, methods=[method])


def test_pretrained_model_that_does_not_exist():
    config = load("model=hf", "model.name_or_path=/no/such")
    message = "model must be a folder or a name on the Hugging Face hub, got /no/such, which does"
    with pytest.raises(ValueError, match=message):
        build_model(config.model, 300)


def test_folder_without_a_pretrained_model(tmp_path):
    config = load("model=hf", f"model.name_or_path={tmp_path}")
    with pytest.raises(ValueError, match=f"got {tmp_path}, which cannot be loaded"):
        build_model(config.model, 300)


def test_model_smaller_than_the_tokenizer():
    config = load("model=tiny", "+model.config.vocab_size=64")
    with pytest.raises(ValueError, match=r"at least the tokenizer's 300 embeddings, got 64"):
        build_model(config.model, 300)
