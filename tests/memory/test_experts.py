"""Tests the plan of mixtures of experts against the bytes that a step really takes."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import lctrain
from lctrain.config import AdapterConfig
from lctrain.loss import causal_lm_loss
from lctrain.memory import plan, use_policy
from lctrain.memory.experts import grouped_product
from lctrain.memory.profile import profile
from lctrain.memory.tracker import Tracker, torch_autocast_takes_meta
from lctrain.models.low_rank import add_adapter
from lctrain_kernels.autocast import autocast_dtype, autocast_on_meta
from tests.models.families import make_model

TOKENS = 384


def make_mixtral(dtype=torch.float32, experts=4, chosen=2):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=chosen,
        max_position_embeddings=TOKENS,
    )
    model = MixtralForCausalLM(config).to(dtype).train()
    for name, weight in model.named_parameters():
        weight.requires_grad_("norm" in name)  # gradients of few bytes
    lctrain.patch_model(model, fused=True)
    return model


@pytest.mark.parametrize("policy", ["none", "checkpoint"])
@pytest.mark.parametrize("adapts", [False, True], ids=["weights", "adapters"])
def test_the_plan_is_within_5_percent_of_what_a_step_takes(policy, adapts):
    model = adapted() if adapts else make_mixtral()
    planned = plan(model, TOKENS, policy)
    if policy != "none":
        use_policy(model, policy, tokens=TOKENS)
    batch = lctrain.PackedBatch.from_documents([torch.arange(TOKENS) % 64])
    causal_lm_loss(model, batch)[0].backward()
    tracker = Tracker()
    tracker.ignore([*model.parameters(), *model.buffers()])
    with tracker:
        causal_lm_loss(model, batch)[0].backward()
    expected = planned.tensor_bytes - planned.parts["weights"] - planned.parts["optimizer"]
    assert 20 * abs(expected - tracker.peak) <= tracker.peak, (expected, tracker.peak)


def test_operations_are_those_of_the_experts_that_compute_a_token():
    found = {}
    for experts, chosen in ((4, 2), (8, 2), (8, 4)):
        model = make_mixtral(experts=experts, chosen=chosen)
        found[experts, chosen] = profile(model.requires_grad_(), TOKENS)
    router = 2 * TOKENS * 4 * 64  # operations of four more rows of the router
    once = 2 * TOKENS * 2 * 3 * 64 * 96  # two experts of three matrices
    few, many, more = (found[key].other_operations for key in found)
    assert many - few == router
    assert more - many == once
    assert found[8, 4].trained_operations == more


def test_mixed_precision_and_a_loop_over_experts_are_planned():
    """On the meta device torch multiplies by experts in bfloat16 only, and loops over none."""
    model = make_mixtral()
    found = {precision: profile(model, TOKENS, precision) for precision in ("true", "bf16-mixed")}
    assert found["true"].layers[0].saved > found["bf16-mixed"].layers[0].saved
    assert profile(make_mixtral(torch.bfloat16), TOKENS).layers[0].inputs == 2 * TOKENS * 64
    loop = make_model("gpt_oss")  # experts_implementation is "eager"
    lctrain.patch_model(loop)
    assert profile(loop, 32).layers[0].backward > 0
    assert loop.config._experts_implementation == "eager"


def test_products_by_experts_have_the_shapes_of_torch():
    offsets = torch.tensor([8, 16, 24, 32], dtype=torch.int32)
    shapes = (((32, 16), (4, 16, 48)), ((16, 32), (32, 48)), ((4, 8, 16), (4, 16, 48)))
    for given in (*shapes, ((4, 8, 16), (16, 32))):
        for dtype in (torch.float32, torch.bfloat16):
            first, second = (torch.ones(shape, dtype=dtype) for shape in given)
            ends = None if first.dim() == second.dim() == 3 else offsets
            expected = torch.nn.functional.grouped_mm(first, second, offs=ends)
            found = grouped_product(first, second, ends)
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def adapted(**settings):
    """Returns a mixture with adapters; peft from 0.21 on adapts experts as linear layers."""
    pytest.importorskip("peft", minversion="0.21")
    return add_adapter(make_mixtral(), AdapterConfig(rank=2, **settings))


def test_what_peft_cannot_do_with_experts_is_an_error_that_names_the_option():
    for settings, message in (
        ({"dropout": 0.1}, "adapter.dropout must be 0 for adapters of experts.*dropout=0.1"),
        ({"dora": True}, "adapter must be lora for adapters of experts.*dora=True"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*adapter.targets: .*k_proj, lm_head"):
            adapted(**settings)
        adapted(targets=["q_proj"], **settings)


def test_adapters_of_experts_cost_the_gradients_of_the_weights_that_they_change():
    whole, model = profile(make_mixtral(), TOKENS), adapted()
    some = profile(adapted(targets=["q_proj"]), TOKENS)
    found = profile(model, TOKENS)
    experts = 2 * TOKENS * (2 * 3 * 64 * 96 + 4 * 64)  # two of three matrices each, and the router
    linear = sum(p.numel() for n, p in model.named_parameters() if "attn.q_proj.lora" in n) / 4
    assert some.trained_operations == 2 * TOKENS * linear
    adapters = found.other_operations - whole.other_operations  # of linear layers
    assert found.trained_operations == experts + adapters
    mixed = profile(model, TOKENS, "bf16-mixed")
    assert found.layers[0].saved > mixed.layers[0].saved
    assert torch.autocast is torch.amp.autocast_mode.autocast


def test_autocast_on_meta_is_that_of_the_context():
    with torch_autocast_takes_meta(), autocast_on_meta(torch.bfloat16):
        with torch.autocast("meta", enabled=False):
            assert autocast_dtype("meta") is None
        with torch.amp.autocast(device_type="meta", dtype=torch.float16):
            assert autocast_dtype("meta") == torch.float16
        with torch.autocast("cpu", torch.bfloat16):
            assert autocast_dtype("cpu") == autocast_dtype("meta") == torch.bfloat16
        assert autocast_dtype("cpu") is None
