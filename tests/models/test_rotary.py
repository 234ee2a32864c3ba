"""Tests which models dual chunk attention supports: those that rotate whole heads as Llama does."""

import pytest
import torch
import transformers
from torch import nn

from lctrain.models import patch_model
from lctrain.models.rotary import find_rotary, probe_layers, require_half_split
from tests.models.families import FAMILIES, ROTARY, SIZES, make_model, make_rotary_model


def make(name, device, **config):
    model_class = getattr(transformers, name)
    with torch.device(device):
        return model_class(model_class.config_class(**(SIZES | config)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Phi3ForCausalLM", {}),
        ("GemmaForCausalLM", {"head_dim": 8}),
        ("MixtralForCausalLM", {"num_local_experts": 2}),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 1]}),
        ("Olmo2ForCausalLM", {}),  # its norms stand before the rotation
    ],
)
def test_accepted(device, name, config):
    model = make(name, device, **config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    handle = patch_model(model, attention="dual_chunk")
    assert handle.spec.chunk_size == 63
    assert torch.equal(torch.random.get_rng_state(), random)
    if device == "cpu":
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("OPTForCausalLM", {"ffn_dim": 48}, "one rotary embedding .* OPTForCausalLM with none"),
        ("Gemma3ForCausalLM", {"head_dim": 8}, "one rotary embedding .* Gemma3.* with several"),
        ("CohereForCausalLM", {}, "in halves, as Llama does, .* got CohereAttention, .*interleav"),
        ("GlmForCausalLM", {"head_dim": 8}, "cover the whole head of 8, got 4 columns in GlmAtt"),
        (
            "SmolLM3ForCausalLM",
            {"no_rope_layers": [1, 0]},
            "got SmolLM3Attention, which does not rotate them. Patch it with attention='flash'",
        ),
        (
            "HunYuanDenseV1ForCausalLM",  # norms after the rotation, their weights all 1 at first
            {"head_dim": 8},
            "do nothing to them after, got HunYuanDenseV1Attention, which does otherwise",
        ),
        ("Ministral3ForCausalLM", {"head_dim": 8}, "Ministral3Attention, which reads position_ids"),
        ("EuroBertModel", {}, "attention to the future in EuroBertAttention. Patch the model with"),
    ],
)
def test_refused(device, name, config, message):
    with pytest.raises(ValueError, match=message):
        patch_model(make(name, device, **config), attention="dual_chunk")


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(ROTARY) | {"mistral"}))
def test_every_other_family_of_the_tests_is_refused_and_left_alone(family):
    messages = {
        "mistral": "got a sliding window in MistralAttention. Patch the model with attention='fla",
        "gemma2": "got a sliding window in Gemma2Attention",
        "phi3": "got a sliding window in Phi3Attention",
        "gpt_oss": "got a sliding window in GptOssAttention",
        "deepseek_v3": r"the whole head of 12, got 4 columns in Deepseek.* \(partial rotary",
        "bert": "one rotary embedding .* BertModel with none",
        "modernbert": "one rotary embedding .* ModernBertModel with several",
    }
    model = make_model(family)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=messages[family]):
        patch_model(model, attention="dual_chunk")
    assert model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("family", "found"),
    [("gemma2", "softcapped logits in Gemma2"), ("gpt_oss", "attention sinks in GptOssAttention")],
)
def test_what_is_left_when_windows_are_not(family, found):
    model = make_model(family, layer_types=["full_attention"] * 2)
    with pytest.raises(ValueError, match=found):
        patch_model(model, attention="dual_chunk")


def test_frequencies_that_follow_the_highest_position():
    rope = {"rope_theta": 100.0, "factor": 2.0}
    longrope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32,
    }
    model = make_rotary_model("llama", rope_parameters=rope | longrope)
    with pytest.raises(
        ValueError, match=r"at most the 32 tokens .* 'longrope' .* got 64. Pass window=32"
    ):
        patch_model(model, attention="dual_chunk")
    model = make_rotary_model("llama", rope_parameters=rope | {"rope_type": "dynamic"})
    with pytest.raises(ValueError, match=r"at most the 64 tokens .* 'dynamic' .* got 84"):
        patch_model(model, attention="dual_chunk", chunk_size=96, local_size=12, window=100)


def test_a_model_that_counts_positions_itself():
    class Counting(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    model = Counting(make_rotary_model("llama").config)
    with pytest.raises(ValueError, match=r"must take position_ids .* got Counting, which counts"):
        patch_model(model, attention="dual_chunk")


def test_layers_of_a_form_of_their_own():
    model = make_rotary_model("llama")

    class Attention(type(model.model.layers[0].self_attn)):
        def forward(self, hidden_states, extra, **kwargs):
            return super().forward(hidden_states, **kwargs)

    model.model.layers[1].self_attn.__class__ = Attention
    with pytest.raises(ValueError, match=r"known form .* got Attention, which failed on its own"):
        patch_model(model, attention="dual_chunk")


def test_one_layer_of_each_sort_is_run():
    model = make_rotary_model("llama", num_hidden_layers=4)
    model.model.layers[2].self_attn.scaling = 0.5
    probes = list(probe_layers(model, find_rotary(model)))
    assert [probe.layer.layer_idx for probe in probes] == [0, 2]
    for probe in probes:
        require_half_split(probe)


def test_weights_in_integers_are_run_as_they_are():
    """Quantized layers have integer weights."""

    class Quantized(nn.Module):
        def __init__(self, linear):
            super().__init__()
            scale = linear.weight.detach().abs().max() / 127
            weight = (linear.weight.detach() / scale).round().to(torch.int8)
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.scale = float(scale)

        def forward(self, states):
            return states @ (self.weight.to(states.dtype) * self.scale).T

    model = make_rotary_model("llama")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Quantized(getattr(layer.self_attn, name)))
    handle = patch_model(model.bfloat16(), attention="dual_chunk")
    assert len(handle.layers) == 2
