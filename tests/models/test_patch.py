"""Tests patch_model and its handle: options, repr, and unpatching."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lctrain.attention import FlashSpec
from lctrain.attention.spec import ATTENTION_NAMES
from lctrain.models import patch_model
from lctrain.models.attention_swap import serving_backend
from lctrain_kernels import backend
from tests.models.families import FAMILIES, make_documents, make_model, outputs, packed_outputs


def state(model):
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return (
        {key: dict(vars(config)) for key, config in configs.items()},
        {name: dict(vars(m)) for name, m in model.named_modules()},
    )


def hooks(model):
    return [len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_gives_back_every_bit_and_every_attribute(family):
    model = make_model(family)
    inputs = {"input_ids": make_documents([9])[0][None]}
    before, attributes, hooked = outputs(model, **inputs), state(model), hooks(model)
    handle = patch_model(model)
    assert hooks(model) != hooked
    packed_outputs(model, make_documents())
    handle.unpatch()
    assert torch.equal(outputs(model, **inputs), before)
    assert hooks(model) == hooked
    configs, modules = state(model)
    assert configs == attributes[0]
    for name, attribute in modules.items():
        assert attribute.keys() == attributes[1][name].keys()


def test_unpatch_twice_and_with_an_error_inside():
    model = make_model("llama")
    with pytest.raises(RuntimeError, match="inside"), patch_model(model) as handle:
        raise RuntimeError("inside")
    assert model.config._attn_implementation == "sdpa"
    assert not handle.active
    handle.unpatch()
    patch_model(model).unpatch()


def test_generate_after_unpatch_is_what_it_was():
    model = make_model("llama")
    prompt = make_documents([5])[0][None]
    before = model.generate(prompt, max_new_tokens=6, do_sample=False)
    handle = patch_model(model)
    packed_outputs(model, make_documents())
    handle.unpatch()
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), before)


def test_models_that_share_a_config_are_patched_one_by_one():
    first = make_model("llama")
    second = type(first)(first.config)
    handle = patch_model(first)
    assert first.config._attn_implementation == "lctrain_flash"
    assert second.config._attn_implementation == "sdpa"
    handle.unpatch()
    assert first.config is second.config


def test_changes_of_the_config_survive_unpatch():
    model = make_model("llama")
    config = model.config
    handle = patch_model(model)
    model.resize_token_embeddings(70)
    handle.unpatch()
    assert model.config is config
    assert config.vocab_size == 70
    assert config._attn_implementation == "sdpa"


def test_saved_while_patched_is_saved_as_if_not(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model("llama")
    inputs = {"input_ids": make_documents([9])[0][None]}
    before = outputs(model, **inputs)
    model.save_pretrained(tmp_path / "plain")
    with patch_model(model, dropout=0.1):
        model.save_pretrained(tmp_path / "patched")
    saved = [(tmp_path / name / "config.json").read_text() for name in ("plain", "patched")]
    assert saved[0] == saved[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched").eval()
    assert torch.equal(outputs(loaded, **inputs), before)


def test_copies_and_pickles_of_a_patched_model_are_patched(tmp_path):
    model, documents = make_model("llama"), make_documents()
    with patch_model(model):
        expected = packed_outputs(model, documents)
        assert torch.equal(packed_outputs(copy.deepcopy(model), documents), expected)
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(packed_outputs(loaded, documents), expected)


def test_the_inner_model_may_be_called_by_itself():
    model, documents = make_model("llama"), make_documents()
    with patch_model(model):
        logits = packed_outputs(model, documents)
        states = packed_outputs(model.model, documents)
        assert torch.equal(model.lm_head(states), logits)


def test_repr_lists_what_was_swapped():
    model = make_model("gemma2")
    before = model.config._attn_implementation
    handle = patch_model(model, dropout=0.25)
    text = repr(handle)
    for expected in (
        "Gemma2ForCausalLM",
        "active",
        f"{before} -> lctrain_flash",
        "dropout=0.25",
        "deterministic=False",
        "backend='auto'",
        "kernels: pytorch",
        "model.layers.0.self_attn: Gemma2Attention",
        "model.layers.1.self_attn: Gemma2Attention",
    ):
        assert expected in text
    handle.unpatch()
    assert "unpatched" in repr(handle)


def test_repr_of_a_model_that_its_backend_cannot_serve(monkeypatch):
    import lctrain.kernels as kernels

    handle = patch_model(make_model("llama"), backend="pytorch")

    def refuse(*_, **__):
        raise ValueError("backend must fit")

    monkeypatch.setattr(kernels, "select_backend", refuse)
    assert "kernels: none: backend must fit" in repr(handle)


def test_float32_weights_warn_of_no_slow_path(recwarn, monkeypatch):
    """Mixed precision keeps float32 weights, but calls attention in bfloat16."""
    monkeypatch.setattr(backend, "_warned", set())
    weight = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    model = SimpleNamespace(parameters=lambda: iter([weight]))
    assert serving_backend(model, FlashSpec()) == "pytorch"
    assert not recwarn
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device_type: torch.bfloat16)
    monkeypatch.setattr(backend, "hopper_serves", lambda device: False)
    assert serving_backend(model, FlashSpec()) == "triton"


def test_every_layer_carries_the_spec():
    handle = patch_model(make_model("llama"), dropout=0.1, deterministic=True, backend="pytorch")
    specs = {layer.lctrain_attention_spec for layer in handle.layers.values()}
    assert specs == {FlashSpec(0.1, True, "pytorch")}
    assert len(handle.layers) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "ring"}, "one of 'flash', 'dual_chunk', 'differential', got 'ring'"),
        (
            {"dropuot": 0.1},
            "options of attention='flash' must be among dropout, deterministic, backend, "
            "sliding_window, batch_invariant, got dropuot. Check the spelling",
        ),
        (
            {"chunk_size": 16},
            r"options of attention='flash' must be .* got chunk_size. It belongs to .*'dual_chunk'",
        ),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), or None .* got 1.0"),
        ({"deterministic": 1}, "deterministic must be True or False, got 1"),
        ({"backend": "cuda"}, "backend must be one of .* got 'cuda'"),
    ],
)
def test_bad_options(options, message):
    model = make_model("llama")
    with pytest.raises(ValueError, match=message):
        patch_model(model, **options)
    assert model.config._attn_implementation == "sdpa"


def test_patching_twice():
    model = make_model("llama")
    handle = patch_model(model)
    with pytest.raises(ValueError, match="model must not be patched, got one that is"):
        patch_model(model)
    with pytest.raises(ValueError, match="model must not be patched"):
        patch_model(model.model)
    handle.unpatch()


def test_patching_around_a_patched_model():
    model = make_model("llama")
    with patch_model(model.model), pytest.raises(ValueError, match="must not be patched"):
        patch_model(model)


def test_changing_the_attention_under_the_patch():
    model = make_model("llama")
    with patch_model(model):
        model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="must be lctrain_flash, got sdpa: it was changed"):
            packed_outputs(model, make_documents())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: nn.Sequential(m)])
def test_wrappers(wrap):
    with pytest.raises(ValueError, match="model must be a transformers PreTrainedModel, got"):
        patch_model(wrap(make_model("llama")))


def test_repr_names_the_kernels_of_autocast_s_dtype(monkeypatch):
    handle = patch_model(make_model("llama"))
    monkeypatch.setattr("lctrain.models.attention_swap.serving_backend", lambda *_: "hopper")
    assert "dtypes other than float16 and bfloat16" in repr(handle)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "kernels: hopper\n" in repr(handle)


def test_repr_of_an_attention_that_the_registry_does_not_know(monkeypatch):
    handle = patch_model(make_model("llama"))
    monkeypatch.setattr("lctrain.models.attention_swap.serving_backend", lambda *_: "hopper")
    monkeypatch.setitem(ATTENTION_NAMES, "own", "lctrain_own")
    handle.attention.spec = type("OwnSpec", (FlashSpec,), {"kind": "own"})()
    assert "kernels: hopper\n" in repr(handle)
