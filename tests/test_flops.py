"""Tests the count of model FLOPs and the table of peak FLOP/s."""

import pytest
import torch

from lctrain import PackedBatch
from lctrain.callbacks.batches import BatchView
from lctrain.flops import FlopCounter, peak_flops, visible_pairs


@pytest.mark.parametrize("window", [None, 1, 3, 8, 50])
@pytest.mark.parametrize("length", [1, 2, 8, 13])
def test_visible_pairs_by_counting(length, window):
    counted = sum(
        1 for i in range(length) for j in range(i + 1) if window is None or i - j < window
    )
    assert visible_pairs(length, window) == counted


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
    assert FlopCounter.of(Gemma2ForCausalLM(config)).windows == (4, None)


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
    counter = FlopCounter(matrix_parameters=0.0, attention_width=1.0, windows=(None, 9))
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
