"""Tests which models generate by continuous batching, and that a training stays as it is."""

import pytest
import torch
from torch import nn

import lctrain
from lctrain.attention.forward import SPEC_ATTRIBUTE
from lctrain.attention.spec import DualChunkSpec
from lctrain.generation.road import find_cache
from lctrain.loss import causal_lm_loss

PROMPTS = [[5, 6, 7], [8] * 70]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def deepseek():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "kv_lora_rank": 8}
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 8}
    layers = {"num_hidden_layers": 1, "first_k_dense_replace": 1, "num_attention_heads": 2}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **layers)).eval()


def test_models_that_need_padded_batches(endless):
    plain = endless()
    assert find_cache(plain) == "it is not patched"
    with lctrain.patch_model(plain, attention="dual_chunk"):
        layer = plain.model.layers[1].self_attn
        setattr(layer, SPEC_ATTRIBUTE, DualChunkSpec(backend="hopper"))
        assert find_cache(plain) == "the backend 'hopper' has no decode kernels"
    with lctrain.patch_model(plain):
        assert find_cache(plain).layers == 2
        plain.model.layers[1].self_attn.layer_idx = 0
        assert "share a cache" in find_cache(plain)
        plain.model.layers[1].self_attn.layer_idx = 1
        plain.model.layers[0].self_attn.is_causal = False
        assert find_cache(plain) == "a layer is not causal"
        del plain.model.layers[0].self_attn.is_causal
        plain.lm_head.compile(backend="eager")
        assert find_cache(plain) == "it is compiled"
    dynamic = endless(rope_parameters=DYNAMIC)
    with lctrain.patch_model(dynamic):
        assert find_cache(dynamic) == "its RoPE frequencies depend on the length"
    latent = deepseek()
    with lctrain.patch_model(latent), torch.no_grad():
        assert find_cache(latent) == "keys and values have head dims 16 and 8"


def test_what_the_caller_demands(patched, endless):
    plain = endless()
    with pytest.raises(ValueError, match=r"batching must be 'padded' or .* for Llama.* not pat"):
        lctrain.generate(plain, PROMPTS, batching="continuous")
    with pytest.warns(UserWarning, match="cache_gib is not used: it is not patched"):
        lctrain.generate(plain, PROMPTS, cache_gib=1, max_new_tokens=1)
    with pytest.warns(UserWarning, match="shared_prefixes is not used: it is not patched"):
        lctrain.generate(plain, PROMPTS, shared_prefixes="always", max_new_tokens=1)
    with pytest.raises(ValueError, match=r"cache_gib must be at least .* got 9.99e-07\. Shorten"):
        lctrain.generate(patched, PROMPTS, cache_gib=1e-6)


def test_adapters(patched):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    lora = get_peft_model(patched, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)).train()
    nn.init.normal_(lora.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight)
    options = {"temperature": 0, "max_new_tokens": 4}
    found = lctrain.generate(lora, PROMPTS, batching="continuous", **options)
    assert found[0].token_ids == lctrain.generate(lora, PROMPTS[:1], **options)[0].token_ids
    padded = lctrain.generate(lora, PROMPTS, batching="padded", **options)
    assert [one.token_ids for one in found] == [one.token_ids for one in padded]
    tuned = get_peft_model(
        lora.unload(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    assert find_cache(tuned) == "its adapter has virtual tokens"


@pytest.mark.parametrize("fused", [False, True])
def test_a_training_is_equal_with_and_without(endless, fused):
    """Gradients, weights and random states are the same bits."""

    def train(rollouts: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(3)
        model = endless(attention_dropout=0.2).train()
        lctrain.patch_model(model, fused=fused, loss=fused)
        module = nn.Module()
        module.model = model
        optimizer = torch.optim.AdamW(model.parameters())
        for step in range(2):
            batch = lctrain.PackedBatch.from_documents([torch.arange(9), torch.arange(30)])
            causal_lm_loss(model, batch)[0].backward()
            if rollouts:  # between a backward and its optimizer step
                lctrain.generate(
                    module, PROMPTS, max_new_tokens=3, seeds=step, batching="continuous"
                )
            optimizer.step()
        assert model.training
        return [*model.parameters()], torch.get_rng_state()

    (with_rollouts, state), (without, expected_state) = train(True), train(False)
    assert torch.equal(state, expected_state)
    for found, expected in zip(with_rollouts, without, strict=True):
        assert torch.equal(found, expected)
        assert torch.equal(found.grad, expected.grad)


def test_a_pool_is_freed(patched, monkeypatch):
    import weakref

    from lctrain.generation import continuous

    pools = []

    class Watched(continuous.PagePool):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            pools.append(weakref.ref(self))

    monkeypatch.setattr(continuous, "PagePool", Watched)
    lctrain.generate(patched, PROMPTS, max_new_tokens=2)
    assert [pool() for pool in pools] == [None]


def test_a_module_generates_in_the_precision_of_its_trainer(patched):
    from lightning import LightningModule, Trainer

    module = LightningModule()
    module.model = patched
    options = {"max_new_tokens": 3, "batching": "continuous"}
    exact = lctrain.generate(module, PROMPTS, **options)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = lctrain.generate(patched, PROMPTS, **options)
    module.trainer = Trainer(
        accelerator="cpu", precision="bf16-mixed", logger=False, enable_checkpointing=False
    )
    found = lctrain.generate(module, PROMPTS, **options)
    assert found == rounded != exact
    assert not torch.is_autocast_enabled("cpu")
