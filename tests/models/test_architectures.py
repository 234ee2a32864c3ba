"""Tests that unsupported models are refused before training, with a reason and a remedy."""

import copy

import pytest
import torch
import transformers
from torch import nn

from lctrain.models import patch_model
from lctrain.models.architectures import head_dims
from tests.models.families import make_documents, make_model, packed_outputs, separate_outputs
from tests.models.tiny import tiny_model
from tests.numerics import assert_error_at_most_twice

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("FalconForCausalLM", {}, "AttentionInterface, got FalconForCausalLM.*in FalconAttention"),
        ("BloomForCausalLM", {"n_layer": 2, "n_head": 4}, "AttentionInterface, got Bloom"),
        ("MambaForCausalLM", {}, "full or sliding-window attention only, got Mamba.*MambaMixer"),
        (
            "Qwen3NextForCausalLM",
            {"layer_types": ["linear_attention", "full_attention"]},
            "attention only, got Qwen3Next.*linear_attention.*leak into one another",
        ),
        (
            "Lfm2ForCausalLM",
            {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
            "attention only, got Lfm2ForCausalLM with Conv1d, Lfm2ShortConv, conv",
        ),
        (
            "Llama4ForCausalLM",
            {"num_key_value_heads": 2, "intermediate_size": 48, "intermediate_size_mlp": 48},
            "attention only, got Llama4ForCausalLM with chunked_attention",
        ),
        (
            "Qwen2MoeForCausalLM",
            {"use_sliding_window": True, "sliding_window": 4, "num_key_value_heads": 2},
            "hand their sliding window to the attention function, got Qwen2MoeAttention",
        ),
        ("StableLmForCausalLM", {}, "StableLmDecoderLayer drops them"),
        ("SiglipTextModel", {}, "SiglipAttention drops them"),
        (
            "Gemma3TextModel",
            {"use_bidirectional_attention": True, "num_key_value_heads": 2},
            "use_bidirectional_attention must be False for Gemma3TextModel, got True",
        ),
        ("T5ForConditionalGeneration", {}, "got the encoder-decoder T5.*get_encoder"),
        ("ViTModel", {"image_size": 8, "patch_size": 4}, "must read input_ids, got ViTModel"),
    ],
)
def test_refused(name, config, message):
    model_class = getattr(transformers, name)
    try:
        settings = model_class.config_class(**(SMALL | config))
    except TypeError:
        settings = model_class.config_class()
    with torch.device("meta"):
        model = model_class(settings)
    with pytest.raises(ValueError, match=message):
        patch_model(model)


def test_not_a_transformers_model():
    with pytest.raises(ValueError, match="must be a transformers PreTrainedModel, got Linear"):
        patch_model(nn.Linear(2, 2))


def test_output_attentions_in_the_config():
    model = make_model("llama", attn_implementation="eager", output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions must be False, got True in the model"):
        patch_model(model)


def test_an_attention_that_drops_keyword_arguments_is_noticed():
    model = make_model("llama")
    layer = model.model.layers[0]
    with patch_model(model), pytest.raises(ValueError, match="must be reached through the patched"):
        layer.self_attn(
            torch.randn(1, 4, 32),
            position_embeddings=(torch.ones(1, 4, 8), torch.zeros(1, 4, 8)),
            attention_mask=None,
        )


def test_embeddings_that_hold_their_neighbours_are_refused():
    model = tiny_model("mobilebert", transformers.MobileBertForMaskedLM)
    with pytest.raises(ValueError, match=r"attention only, got MobileBert.* with trigram_input"):
        patch_model(model)


def test_heads_wider_than_the_kernels_take():
    """Gemma 4 has heads of 256 and of 512; only the PyTorch path takes 512."""
    wide = {"head_dim": 256, "global_head_dim": 512, "layer_types": ["sliding_attention"] * 2}
    wide["layer_types"][1] = "full_attention"
    model = tiny_model("gemma4_text", transformers.Gemma4ForCausalLM, num_hidden_layers=2, **wide)
    assert head_dims(model) == [256, 512]
    documents = make_documents()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        plain, reference = (separate_outputs(m, documents) for m in (model, exact))
        with patch_model(model) as handle:
            assert "kernels: pytorch" in repr(handle)
            assert_error_at_most_twice(packed_outputs(model, documents), plain, reference)
    with pytest.raises(ValueError, match="head_dim must be at most 256 for backend='triton', got"):
        patch_model(model, backend="triton")


def test_value_heads_narrower_and_wider_than_the_query_s():
    for value_dim in (6, 20):
        settings = {"v_head_dim": value_dim, "first_k_dense_replace": 2}
        model = tiny_model("deepseek_v3", transformers.DeepseekV3ForCausalLM, **settings)
        documents = make_documents()
        with torch.no_grad():
            exact = copy.deepcopy(model).double()
            plain, reference = (separate_outputs(m, documents) for m in (model, exact))
            with patch_model(model):
                assert_error_at_most_twice(packed_outputs(model, documents), plain, reference)
