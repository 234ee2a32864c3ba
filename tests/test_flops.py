"""Tests the count of model FLOPs and the table of peak FLOP/s."""

import pytest
import torch
import transformers
from torch import nn

from lctrain import PackedBatch
from lctrain.callbacks.batches import BatchView
from lctrain.flops import AttentionLayer, FlopCounter, peak_flops, visible_pairs
from tests.models.tiny import tiny_config


@pytest.mark.parametrize("window", [None, 1, 3, 8, 50])
@pytest.mark.parametrize("length", [1, 2, 8, 13])
def test_visible_pairs_by_counting(length, window):
    counted = sum(
        1 for i in range(length) for j in range(i + 1) if window is None or i - j < window
    )
    assert visible_pairs(length, window) == counted


@pytest.mark.parametrize("chunk", [1, 3, 8, 50])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("length", [1, 8, 13])
def test_visible_pairs_of_chunks_by_counting(length, window, chunk):
    counted = sum(
        1
        for i in range(length)
        for j in range(i + 1)
        if i // chunk == j // chunk and (window is None or i - j < window)
    )
    assert visible_pairs(length, window, chunk) == counted


@pytest.mark.parametrize("tied", [True, False])
def test_dense_part_is_six_per_weight_of_the_matrix_products(make_llama, tied):
    """Torch counts FLOPs of one token, whose attention costs only 4 H D per layer."""
    from torch.utils.flop_counter import FlopCounterMode

    model = make_llama(tie_word_embeddings=tied, attn_implementation="eager")
    with FlopCounterMode(display=False) as torch_counter, torch.no_grad():
        model(torch.tensor([[5]]), use_cache=False)
    counted = FlopCounter.of(model).step_flops([1])
    # Some versions of transformers form the rotary angles by a product, which has no weights.
    modules = torch_counter.get_flop_counts()
    rotary = sum(sum(modules[name].values()) for name in modules if name.endswith("rotary_emb"))
    assert counted == 3 * (torch_counter.get_total_flops() - rotary)


def test_attention_part_counts_the_causal_half(make_llama):
    counter = FlopCounter.of(make_llama())
    dense = 6 * counter.matrix_parameters * 10
    pairs = 10 * 11 / 2
    assert counter.step_flops([10]) - dense == 2 * 12 * 4 * 8 * pairs  # layers, heads, head_dim
    assert counter.step_flops([4, 6]) < counter.step_flops([10])


def test_sliding_layers_see_their_window():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
    )
    layers = FlopCounter.of(Gemma2ForCausalLM(config)).layers
    assert layers == (AttentionLayer(16.0, 4), AttentionLayer(16.0))


HETEROGENEOUS = hasattr(transformers.PreTrainedConfig, "per_layer_config")
FAMILIES = (
    "gemma3_text gpt_oss mixtral deepseek_v3 qwen2_moe ernie4_5_moe minicpm3 mimo_v2_flash "
    "granitemoeshared laguna"
)
OVERRIDES = {"laguna": {"num_attention_heads_per_layer": [4, 2, 8, 4]}}


@pytest.mark.parametrize(
    "family",
    [
        *(name for name in FAMILIES.split() if name in transformers.CONFIG_MAPPING),
        *(["gemma4_text"] if HETEROGENEOUS else []),
    ],
)
def test_weights_and_widths_are_those_that_torch_counts(family):
    """Eager attention of L tokens computes all L^2 pairs: 2 P L + 4 W L^2 FLOPs in a forward."""
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config(family, **OVERRIDES.get(family, {}))
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    forward = []
    for length in (1, 2):
        with FlopCounterMode(display=False) as torch_counter, torch.no_grad():
            model.eval()(torch.arange(3, 3 + length)[None], use_cache=False)
        modules = torch_counter.get_flop_counts()
        rotary = sum(sum(modules[name].values()) for name in modules if name.endswith("rotary_emb"))
        forward.append(torch_counter.get_total_flops() - rotary)
    one, two = forward
    counter = FlopCounter.of(model)
    assert counter.matrix_parameters == (4 * one - two) / 4
    assert sum(layer.width for layer in counter.layers) == (two - 2 * one) / 8


def counted_layers(family, **overrides):
    with torch.device("meta"):
        config = tiny_config(family, **overrides)
        return FlopCounter.of(transformers.AutoModelForCausalLM.from_config(config)).layers


def test_chunked_layers_see_their_chunk():
    chunked, full = AttentionLayer(32.0, chunk=5), AttentionLayer(32.0)
    assert counted_layers("llama4_text") == (chunked, chunked, chunked, full)


@pytest.mark.parametrize("family", ["jamba", "minimax", "qwen3_next", "lfm2", "nemotron_h"])
def test_layers_without_attention_have_no_pairs(family):
    sizes = {"attn_layer_period": 2, "attn_layer_offset": 1} if family == "jamba" else {}
    layers = counted_layers(family, **sizes)
    types = tiny_config(family, **sizes).layer_types
    assert "full_attention" in types
    assert len(set(types)) > 1
    for layer, kind in zip(layers, types, strict=True):
        assert (layer.width > 0) == (kind == "full_attention"), kind


@pytest.mark.skipif(not HETEROGENEOUS, reason="transformers has no per_layer_config")
def test_layers_with_configurations_of_their_own():
    given = {1: {"sliding_window": 7}, 2: {"sliding_window": None, "head_dim": 16}}
    model = nn.Module()  # transformers' Mistral reads one window for all layers
    model.config = tiny_config("mistral", per_layer_config=given)
    few, more = AttentionLayer(32.0, window=5), AttentionLayer(32.0, window=7)
    assert FlopCounter.of(model).layers == (few, more, AttentionLayer(64.0), few)


def test_lists_inside_a_layer_do_not_number_layers():
    """The first layer's tokens use 1 expert and the second's 2, whichever branch holds them."""
    config = transformers.HunYuanMoEV1Config(moe_topk=[1, 2], num_hidden_layers=0)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(nn.Module() for _ in range(2))
            for branch in self.branches:
                branch.experts = nn.ModuleList(nn.Linear(2, 4, bias=False) for _ in range(4))

    model = nn.Module()
    model.config = config
    model.layers = nn.ModuleList([Layer(), Layer()])
    held = 2 * 4 * 8  # branches, experts, weights
    assert FlopCounter.of(model).matrix_parameters == held * 1 / 4 + held * 2 / 4


def test_tables_that_are_looked_up_are_no_matrices():
    model = nn.ModuleDict({"words": nn.Embedding(7, 3), "head": nn.Linear(3, 7)})
    assert FlopCounter.of(model).matrix_parameters == 21


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_weights_that_peft_replaces_by_copies_count_once(make_llama, tied, saved):
    peft = pytest.importorskip("peft")
    model = make_llama(tie_word_embeddings=tied)
    before = FlopCounter.of(model).matrix_parameters
    given = peft.LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=saved)
    adapted = peft.get_peft_model(model, given)
    adapters = sum(p.numel() for name, p in adapted.named_parameters() if ".lora_" in name)
    assert FlopCounter.of(adapted).matrix_parameters == before + adapters


def test_differential_heads_weigh_values_of_twice_their_width():
    """A pair of heads costs six units; transformers' two calls would cost eight."""
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

    config = DiffLlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    counter = FlopCounter.of(DiffLlamaForCausalLM(config))
    dense = 6 * counter.matrix_parameters * 10
    pairs = 10 * 11 / 2
    forward = 2 * 4 * (2 * 8 + 2 * 16) * pairs  # layers, heads, keys of 8 and values of 16
    assert counter.step_flops([10]) - dense == 3 * forward


def test_experts_count_by_the_share_that_a_token_uses():
    from transformers import MixtralConfig, MixtralForCausalLM

    def matrices(experts):
        config = MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=experts,
            num_experts_per_tok=2,
        )
        return FlopCounter.of(MixtralForCausalLM(config)).matrix_parameters

    assert matrices(8) - matrices(4) == 16 * 4  # only the router grows


def test_suffixes_see_their_prefix_too():
    """A prefix of 3 tokens with suffixes of 2 and 4 tokens, and a document of its own."""
    counter = FlopCounter(0.0, (AttentionLayer(1.0), AttentionLayer(1.0, window=9)))
    batch = PackedBatch.from_groups([([5, 6, 7, 8], [[1], [1, 2, 3]]), ([5], [[1]])])
    assert batch.lengths == (3, 2, 4, 2)
    pairs = 6 + (3 + 3 * 2) + (10 + 3 * 4) + 3
    for view in (BatchView(batch), BatchView(batch).without_tokens()):
        assert counter.step_flops(view.lengths, view.parents) == 12 * 2 * pairs


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA B200", 2.25e15),
        ("AMD Instinct MI300X", 1307.4e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks(name, peak):
    assert peak_flops(name) == peak
