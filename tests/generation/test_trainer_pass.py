"""Tests log_probs="trainer": the bits of the trainer's own pass, and ratios that are exactly 1."""

from importlib import import_module

import pytest
import torch

import lctrain
from lctrain.generation import completion_packs
from lctrain.generation.trainer_pass import trainer_log_probs
from lctrain.kernels import linear_cross_entropy
from lctrain.loss import policy_loss, token_log_probs

log_probs = import_module("lctrain.loss.log_probs")
generate = import_module("lctrain.generation.generate")
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [3], [4] * 70]


def rolled_out(model, **options):
    options = {"max_new_tokens": 7, "samples": 3, "log_probs": "trainer"} | options
    return lctrain.generate(model, PROMPTS, **options)


def flat(completions) -> torch.Tensor:
    return torch.tensor([value for one in completions for value in one.log_probs])


@pytest.fixture
def adapted(patched):
    """Returns a model with adapters that change its output."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(patched, LoraConfig(target_modules=["q_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batching", ["continuous", "padded"])
def test_they_are_the_bits_of_the_trainers_pass(patched, dtype, temperature, batching):
    model = patched.to(dtype).train()
    found = rolled_out(model, temperature=temperature, batching=batching)
    drawn = rolled_out(model, temperature=temperature, batching=batching, log_probs="decode")
    assert [one.token_ids for one in found] == [one.token_ids for one in drawn]
    (pack,) = completion_packs(found, samples=3)
    trained = token_log_probs(model, pack, temperature=temperature)
    assert trained.log_probs.requires_grad
    assert torch.equal(flat(found), trained.log_probs.detach())
    loss = policy_loss(trained, flat(found), torch.ones(12), clip_low=1e-9, clip_high=1e-9)
    assert int(loss.clipped) == 0
    assert float(loss.loss.detach()) == -float(loss.divisor)  # every ratio is exactly 1


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_adapters(adapted, precision):
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        found = rolled_out(adapted)
        with adapted.disable_adapter():
            base = rolled_out(adapted)
        (pack,) = completion_packs(found, samples=3)
        trained = token_log_probs(adapted.train(), pack).log_probs.detach()
    assert torch.equal(flat(found), trained)
    assert flat(base).shape != trained.shape or not torch.equal(flat(base), trained)


def test_swapped_layers(endless):
    model = endless()
    with lctrain.patch_model(model, fused=True, loss=True):
        found = rolled_out(model.train())
        (pack,) = completion_packs(found, samples=3)
        assert torch.equal(flat(found), token_log_probs(model, pack).log_probs.detach())


def test_packs_hold_whole_groups_and_bound_the_memory(patched):
    found = rolled_out(patched, pack_tokens=60)
    packs = completion_packs(found, samples=3, max_tokens=60)
    assert [pack.num_tokens for pack in packs] == [27 + 30, 24, 69 + 24]
    assert [len(pack.groups.members) for pack in packs] == [2, 1, 1]
    trained = [token_log_probs(patched, pack).log_probs for pack in packs]
    assert torch.equal(flat(found), torch.cat(trained).detach())


def test_a_pass_has_no_logits_of_all_tokens(patched, monkeypatch):
    found = rolled_out(patched, log_probs="decode")
    rows = []

    def watched(hidden, *arguments, **options):
        rows.append(len(hidden))
        return linear_cross_entropy(hidden, *arguments, **options)

    monkeypatch.setattr(log_probs, "linear_cross_entropy", watched)
    with torch.no_grad():
        trainer_log_probs(patched, found, 3, 1.0, 10_000)
    assert rows == [12 * 7]  # trained tokens only


def test_the_model_must_have_a_trainer_pass_before_tokens_are_drawn(endless, monkeypatch):
    model = endless()
    with pytest.raises(ValueError, match=r"log_probs must be 'decode' unless .*'sdpa'\. Pass log"):
        rolled_out(model)
    with (
        lctrain.patch_model(model, attention="dual_chunk", chunk_size=64, local_size=8),
        pytest.raises(ValueError, match=r"must be 'decode' unless .*'lctrain_dual_chunk'"),
    ):
        rolled_out(model)
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=3.0))
    monkeypatch.setattr(generate, "complete_continuously", lambda *_: 1 / 0)
    with lctrain.patch_model(capped), pytest.raises(ValueError, match="temperature must be 1 for"):
        rolled_out(capped, temperature=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_probs": "exact"}, "log_probs must be one of decode, trainer, got 'exact'"),
        ({"log_probs": None}, "log_probs must be one of decode, trainer, got None"),
        ({"pack_tokens": 0}, "pack_tokens must be an int of at least 1, got 0"),
    ],
)
def test_bad_options(patched, arguments, message):
    with pytest.raises(ValueError, match=message):
        rolled_out(patched, **arguments)


def test_samples_must_fit_the_completions(patched):
    found = rolled_out(patched, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"must be samples=5 per prompt, got 12\. Pass all"):
        completion_packs(found, samples=5)
    with pytest.raises(ValueError, match="got different prompts in completions 0 to 3"):
        completion_packs(found, samples=4)
    assert completion_packs([]) == []


@pytest.mark.parametrize("count", [0, -1, 2.0, "2", True])
@pytest.mark.parametrize("name", ["samples", "max_tokens"])
def test_counts_of_packs_must_be_positive_ints(name, count):
    with pytest.raises(ValueError, match=f"{name} must be an int of at least 1, got {count!r}"):
        completion_packs([], **{name: count})


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_the_bits_of_the_trainer_on_a_gpu(endless, fused):
    model = endless(head_dim=64).to("cuda", torch.bfloat16).train()
    lctrain.patch_model(model, fused=fused, loss=fused)
    found = rolled_out(model)
    (pack,) = completion_packs(found, samples=3)
    trained = token_log_probs(model, pack.to("cuda")).log_probs.detach()
    assert torch.equal(flat(found), trained.cpu())
