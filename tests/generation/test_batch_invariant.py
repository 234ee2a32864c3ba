"""Tests batch_invariant=True: rollouts have the bits of the trainer's log-probabilities."""

import dataclasses

import pytest
import torch

import lctrain
from lctrain.batch import PackedBatch
from lctrain.batch_invariant import is_batch_invariant
from lctrain.callbacks import PatchAttention
from lctrain.config.attention import AttentionConfig
from lctrain.data.share import share_pack
from lctrain.distributed.shared_pack import ContextGroups
from lctrain.generation import completion_packs, continuous
from lctrain.loss import policy_loss, token_log_probs
from lctrain_kernels import fused_backend
from tests.numerics import assert_errors_at_most_twice

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [3], [4] * 20, [5, 6, 7, 8, 9]]
SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 56, "num_hidden_layers": 2}
SIZES["tie_word_embeddings"] = False
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
WINDOW = {"Mistral": {"sliding_window": 6}}


def make_model(family, head_dim=16, layers=2, **options):
    """Returns a tiny model in eval mode without an end token."""
    import transformers

    sizes = SIZES | HEADS | {"head_dim": head_dim, "num_hidden_layers": layers}
    sizes |= WINDOW.get(family, {}) | options
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model


def adapted(model, **options):
    """Returns the model with LoRA in all linear layers, which changes its output."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, **options)).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def flat(completions) -> torch.Tensor:
    return torch.tensor([value for one in completions for value in one.log_probs])


def trained(model, completions, samples=1, temperature=1.0):
    """Returns the log-probabilities of a packed training forward over the same sequences."""
    (pack,) = completion_packs(completions, samples, share_prompts=False)
    device = next(model.parameters()).device
    return token_log_probs(model, pack.to(device), temperature=temperature).log_probs


@pytest.mark.parametrize(
    ("family", "dtype", "temperature", "lora"),
    [
        ("Llama", torch.float32, 1.0, False),
        ("Llama", torch.bfloat16, 0.7, False),
        ("Qwen3", torch.float32, 0.7, False),
        ("Qwen2", torch.float32, 0.0, False),
        ("Mistral", torch.float32, 1.0, False),
        ("Llama", torch.float32, 1.0, True),
    ],
    ids=["llama", "bfloat16", "qwen3", "qwen2", "mistral", "lora"],
)
def test_rollouts_have_the_trainers_bits(family, dtype, temperature, lora, monkeypatch):
    """Continuous batching: five prompts in a batch of three, and prompts in pieces of 8 tokens."""
    monkeypatch.setattr(continuous, "pack_tokens", lambda *_: 8)
    base = make_model(family).to(dtype)
    model = adapted(base) if lora else base
    with lctrain.patch_model(base, batch_invariant=True):
        found = lctrain.generate(
            model.train(), PROMPTS, samples=2, max_new_tokens=5, temperature=temperature,
            batch_size=3,
        )  # fmt: skip
        policy = trained(model.eval(), found, 2, temperature or 1)
        assert torch.equal(flat(found), policy.detach().float())
        alone = lctrain.generate(model, PROMPTS[3:4], max_new_tokens=5, temperature=0)
        beside = lctrain.generate(model, PROMPTS, max_new_tokens=5, temperature=0)
        assert alone[0] == beside[3]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3"])
def test_the_kernels_of_a_gpu_have_the_trainers_bits(family, monkeypatch, ordered_products):
    """All kernels under Triton's interpreter: products, norms, RoPE, attention, pages, losses."""
    choose = fused_backend._choose

    def triton_first(operation, call, backend):
        serves = fused_backend.refusal_of(operation, "triton", call) is None
        return choose(operation, call, "triton" if backend == "auto" and serves else backend)

    monkeypatch.setattr(fused_backend, "_choose", triton_first)
    monkeypatch.setattr(continuous, "pack_tokens", lambda *_: 6)
    model = make_model(family, layers=1).half()
    lctrain.patch_model(model, batch_invariant=True, backend="triton")
    prompts = [[5, 6, 7, 8], [3], [4] * 14]
    found = lctrain.generate(model, prompts, max_new_tokens=3, temperature=0.7, batch_size=2)
    assert torch.equal(flat(found), trained(model, found, 1, 0.7).detach())


def test_the_first_ratio_is_one():
    model = make_model("Llama")
    lctrain.patch_model(model, batch_invariant=True, loss=True)
    found = lctrain.generate(model, PROMPTS, samples=2, max_new_tokens=3)
    (pack,) = completion_packs(found, 2, share_prompts=False)
    policy = token_log_probs(model.train(), pack)
    loss = policy_loss(policy, flat(found), torch.ones(10), clip_low=1e-9, clip_high=1e-9)
    assert int(loss.clipped) == 0
    assert float(loss.loss.detach()) == -float(loss.divisor)
    loss.loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_autocast():
    model = make_model("Llama")
    lctrain.patch_model(model, batch_invariant=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = lctrain.generate(model, PROMPTS, max_new_tokens=3)
        assert torch.equal(flat(found), trained(model, found).detach())


def gradients(model, dtype, **options):
    """Returns the gradients of a policy's log-probabilities, and their sum."""
    model = model.to(dtype)
    batch = PackedBatch.from_documents([[1, 2, 3, 4, 5], [6] * 9, [7, 8]])
    with lctrain.patch_model(model, **options):
        log_probs = token_log_probs(model, batch).log_probs
        log_probs.sum().backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    return found | {"log_probs": log_probs.detach()}


def test_gradients_are_those_of_the_ordinary_road():
    model = make_model("Qwen3")
    ours = gradients(model, torch.float32, batch_invariant=True)
    plain = gradients(model, torch.float32, fused=True)
    exact = gradients(model, torch.float64, fused=True)
    assert_errors_at_most_twice(ours, plain, exact)


def test_the_handle_undoes_it():
    model = make_model("Llama")
    classes = [type(module) for module in model.modules()]
    ids = torch.arange(12)[None]
    before = model(ids).logits
    handle = lctrain.patch_model(model, batch_invariant=True)
    assert "batch_invariant: 15 Linear, 2 FusedLlamaMLP, 1 LlamaRotaryEmbedding" in repr(handle)
    handle.unpatch()
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batching": "padded"}, "batching must be 'auto' or 'continuous' for a batch-invariant"),
        ({"shared_prefixes": "always"}, "shared_prefixes must be 'auto' or 'never' for a batch-"),
        ({"log_probs": "trainer"}, "log_probs must be 'decode' for a batch-invariant model"),
    ],
)
def test_options_of_generate_that_differ(options, message):
    model = make_model("Llama")
    lctrain.patch_model(model, batch_invariant=True)
    with pytest.raises(ValueError, match=message):
        lctrain.generate(model, PROMPTS, **options)


def test_adapters_come_first():
    base = make_model("Llama")
    lctrain.patch_model(base, batch_invariant=True)
    model = adapted(base)
    message = r"got the Linear .*lora_A.*, which came after patch_model\. Add adapters first"
    with pytest.raises(ValueError, match=message):
        lctrain.generate(model, PROMPTS)
    with pytest.raises(ValueError, match=message):
        token_log_probs(model, PackedBatch.from_documents([[1, 2]]))


def test_a_compiled_model_is_refused():
    model = make_model("Llama")
    lctrain.patch_model(model, batch_invariant=True)
    model.model.compile()
    with pytest.raises(ValueError, match="must not be compiled, got model of LlamaModel"):
        token_log_probs(model, PackedBatch.from_documents([[1, 2]]))


def test_groups_that_share_a_prompt_are_refused():
    model = make_model("Llama")
    lctrain.patch_model(model, batch_invariant=True)
    found = lctrain.generate(model, PROMPTS, samples=2, max_new_tokens=2)
    (pack,) = completion_packs(found, 2)
    with pytest.raises(ValueError, match="documents that share a prefix, whose parts are merged"):
        token_log_probs(model, pack)


def test_a_pack_that_ranks_share_is_refused():
    model = make_model("Llama")
    lctrain.patch_model(model, batch_invariant=True)
    batch = share_pack(PackedBatch.from_documents([[1, 2, 3] * 9]), size=2, rank=0)
    share = batch.share.shared_by(ContextGroups(), batch.document_ids)
    batch = dataclasses.replace(batch, share=share)
    with pytest.raises(ValueError, match=r"got a pack that ranks share\. Use trainer\.context_par"):
        model(batch.input_ids, **batch.model_kwargs())


def test_weights_that_ranks_divide_are_refused():
    model = make_model("Llama")
    lctrain.patch_model(model, batch_invariant=True)
    kind = type("DividedWeight", (torch.nn.Parameter,), {})
    linear = model.model.layers[1].mlp.down_proj
    linear._parameters["weight"] = linear.weight.detach().as_subclass(kind)
    with pytest.raises(ValueError, match="needs plain tensors, got a DividedWeight: ranks that"):
        token_log_probs(model, PackedBatch.from_documents([[1, 2]]))


def test_logits_that_a_hook_changes_are_refused():
    model = make_model("Llama")
    lctrain.patch_model(model, batch_invariant=True)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    with pytest.raises(ValueError, match="must have one linear layer between hidden states and lo"):
        lctrain.generate(model, PROMPTS)
    with pytest.raises(ValueError, match="must have one linear layer between hidden states and lo"):
        token_log_probs(model, PackedBatch.from_documents([[1, 2]]))


def test_merged_adapters_have_the_trainers_bits():
    """Weights change under a patch: merged, unmerged again, and without the adapter."""
    base = make_model("Llama")
    model = adapted(base)
    lctrain.patch_model(base, batch_invariant=True)

    def rollouts():
        found = lctrain.generate(model, PROMPTS, max_new_tokens=3)
        assert torch.equal(flat(found), trained(model, found).detach())
        return flat(found)

    before = rollouts()
    model.merge_adapter()
    rollouts()
    model.unmerge_adapter()
    rollouts()
    with model.disable_adapter():
        assert not torch.equal(rollouts(), before)


@pytest.mark.parametrize("options", [{"dora": True}, {}], ids=["dora", "quantized"])
def test_linear_layers_of_another_kind_are_refused(options):
    base = make_model("Llama")
    if options:
        adapted(base, use_dora=True)
    else:
        linear = base.model.layers[1].mlp.up_proj
        linear.__class__ = type("Linear4bit", (torch.nn.Linear,), {})
    message = "batch_invariant=True needs modules that compute every token alone, got "
    with pytest.raises(ValueError, match=message + "(Dora|Linear4bit)"):
        lctrain.patch_model(base, batch_invariant=True)
    assert type(base.model.layers[0].mlp.up_proj).__name__ == "Linear"  # all is undone


def refused_model(name):
    """Returns a tiny model of a family that is not covered."""
    import transformers

    sizes = SIZES | HEADS | {"head_dim": 16}
    extra = {
        "Mixtral": {"num_local_experts": 2},
        "Gemma2": {"query_pre_attn_scalar": 16},
        "Phi3": {"pad_token_id": 0},
    }[name]
    sizes = sizes if name != "Phi3" else {k: v for k, v in sizes.items() if k != "head_dim"}
    config = getattr(transformers, f"{name}Config")(**sizes, **extra)
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("name", ["Mixtral", "Gemma2", "Phi3"])
def test_families_that_are_not_covered(name):
    model = refused_model(name)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"needs modules that compute .* Covered are causal"):
        lctrain.patch_model(model, batch_invariant=True)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 16,
            "factor": 2.0,
        },
    ],
    ids=["dynamic", "longrope"],
)
def test_frequencies_that_depend_on_the_length_are_refused(rope):
    model = make_model("Llama", rope_parameters=rope | {"rope_theta": 1e4})
    message = "frequencies that do not depend on the length, got those of model.rotary_emb"
    with pytest.raises(ValueError, match=message):
        lctrain.patch_model(model, batch_invariant=True)


def test_hybrid_layers_are_refused():
    """Lfm2 mixes neighbouring tokens by a convolution in its first layer."""
    model = make_model("Lfm2", layer_types=["conv", "full_attention"], layers=2)
    with pytest.raises(ValueError, match="by full or sliding-window attention only, got Lfm2"):
        lctrain.patch_model(model, batch_invariant=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "dual_chunk"}, "got batch_invariant. It belongs to attention='flash'"),
        ({"backend": "hopper"}, "backend must be 'auto' or 'triton' with batch_invariant=True"),
        ({"dropout": 0.1}, "dropout must be 0 with batch_invariant=True, got 0.1"),
        ({"batch_invariant": 1}, "batch_invariant must be True or False, got 1"),
    ],
)
def test_options_of_a_patch_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        lctrain.patch_model(make_model("Llama"), **{"batch_invariant": True} | options)


def test_settings_of_a_run():
    assert AttentionConfig(batch_invariant=True).options()["batch_invariant"] is True
    assert "batch_invariant" not in AttentionConfig(name="dual_chunk").options()
    with pytest.raises(ValueError, match="It belongs to attention='flash'"):
        PatchAttention("dual_chunk", batch_invariant=True)
    model = make_model("Llama")
    with PatchAttention(batch_invariant=True)._patch_one(model):
        assert is_batch_invariant(model)
    assert not is_batch_invariant(model)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize(
    ("family", "lora"),
    [("Llama", False), ("Qwen3", False), ("Llama", True)],
    ids=["llama", "qwen3", "lora"],
)
def test_rollouts_have_the_trainers_bits_on_a_gpu(family, lora, graphs, monkeypatch):
    """Prompts of up to 700 tokens, in pieces of 256, beside one another in batches of four."""
    monkeypatch.setattr(continuous, "pack_tokens", lambda *_: 256)
    base = make_model(family, head_dim=64)
    model = (adapted(base) if lora else base).to("cuda", torch.bfloat16)
    lctrain.patch_model(base, batch_invariant=True)
    draw = torch.Generator().manual_seed(2)
    prompts = [torch.randint(97, (n,), generator=draw).tolist() for n in (700, 3, 130, 64, 1, 257)]
    found = lctrain.generate(
        model, prompts, samples=2, max_new_tokens=40, temperature=0.9, batch_size=4,
        cuda_graphs=graphs,
    )  # fmt: skip
    assert torch.equal(flat(found), trained(model, found, 2, 0.9).detach().cpu())
    again = lctrain.generate(
        model, prompts[:1], max_new_tokens=40, temperature=0.9, cuda_graphs=graphs
    )
    assert again[0] == found[0]
