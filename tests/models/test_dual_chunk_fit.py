"""Tests the options of dual chunk attention: defaults, repr, and loading by name."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM

from lctrain.attention import DualChunkSpec
from lctrain.attention.forward import SPEC_ATTRIBUTE
from lctrain.models import patch_model
from lctrain.models.dual_chunk import follow_window
from tests.models.families import (
    ROTARY,
    make_documents,
    make_model,
    make_rotary_model,
    outputs,
    packed_outputs,
    padded,
    separate_outputs,
)
from tests.numerics import assert_equal_in_float64

PUBLISHED = {"chunk_size": 32, "local_size": 8, "original_max_position_embeddings": 33}


def sizes(options=None, **config):
    model = make_rotary_model("qwen2", **config)
    spec = patch_model(model, attention="dual_chunk", **(options or {})).spec
    return spec.window, spec.chunk_size, spec.local_size


@pytest.mark.parametrize(
    ("options", "config", "expected"),
    [
        ({}, {}, (64, 63, 8)),
        ({"window": 32}, {}, (32, 31, 4)),
        ({"chunk_size": 47}, {}, (64, 47, 6)),
        ({"local_size": 0}, {}, (64, 63, 0)),
        ({}, {"dual_chunk_attention_config": PUBLISHED}, (33, 32, 8)),
        ({"local_size": 3}, {"dual_chunk_attention_config": PUBLISHED}, (33, 32, 3)),
        ({"chunk_size": 15}, {"dual_chunk_attention_config": PUBLISHED}, (33, 15, 2)),
        ({}, {"dual_chunk_attention_config": {"chunk_size": 48}}, (64, 48, 6)),
        (
            {},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
            (64, 63, 8),
        ),
    ],
)
def test_sizes_follow_the_window(options, config, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert sizes(options, **config) == expected


def test_chunks_beyond_the_trained_window_are_warned_of():
    message = (
        "below the trained window of 64 tokens, got 95: relative positions from 64 to 95 occur"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        assert sizes({"chunk_size": 95}) == (64, 95, 12)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_size": 63}, r"local_size must be below chunk_size \(63\), got 63"),
        ({"local_size": -1}, "local_size must be an int of at least 0, got -1"),
        ({"scale": "ntk"}, "scale must be one of 'none', 'yarn', got 'ntk'"),
        ({"window_size": 3}, "among dropout, .*, window, got window_size. Check the spelling"),
        ({"backend": "cuda"}, "backend must be one of .* got 'cuda'"),
    ],
)
def test_bad_options(options, message):
    model = make_rotary_model("llama")
    with pytest.raises(ValueError, match=message):
        patch_model(model, attention="dual_chunk", **options)
    assert model.config._attn_implementation == "sdpa"


def test_wrong_sizes_in_the_model_s_config():
    with pytest.raises(ValueError, match=r"local_size must be below chunk_size \(32\), got 40"):
        sizes(dual_chunk_attention_config=PUBLISHED | {"local_size": 40})


def test_a_model_that_does_not_say_its_window():
    config = SimpleNamespace()
    with pytest.raises(ValueError, match=r"window must be given for SimpleNamespace.*Pass window="):
        follow_window(config, DualChunkSpec())
    assert follow_window(config, DualChunkSpec(window=40)).chunk_size == 39


def test_repr_lists_what_was_swapped():
    handle = patch_model(
        make_rotary_model("qwen3"), attention="dual_chunk", chunk_size=47, scale="yarn"
    )
    text = repr(handle)
    for expected in (
        "Qwen3ForCausalLM, active",
        "sdpa -> lctrain_dual_chunk",
        "chunk_size=47, local_size=6, scale='yarn', scale_coefficient=0.1, window=64",
        "dropout=as in the config, deterministic=False, backend='auto'",
        "kernels: pytorch",
        "layers (2):",
        "model.layers.1.self_attn: Qwen3Attention",
    ):
        assert expected in text
    handle.unpatch()
    assert "unpatched" in repr(handle)


@pytest.mark.parametrize("family", ROTARY)
def test_unpatch_gives_back_every_bit(family):
    model, rows = make_rotary_model(family), make_documents([80])[0][None]
    before = outputs(model, input_ids=rows)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with patch_model(model, attention="dual_chunk") as handle:
        assert not torch.equal(outputs(model, input_ids=rows), before)
    assert not handle.active
    assert torch.equal(outputs(model, input_ids=rows), before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_every_layer_carries_the_spec():
    handle = patch_model(make_rotary_model("llama"), attention="dual_chunk", dropout=0.1)
    specs = {getattr(layer, SPEC_ATTRIBUTE) for layer in handle.layers.values()}
    assert specs == {DualChunkSpec(dropout=0.1, chunk_size=63, local_size=8, window=64)}


def test_copies_and_pickles_have_their_own_rotary_embeddings(tmp_path):
    model, documents = make_rotary_model("llama"), make_documents([80])
    with patch_model(model, attention="dual_chunk"):
        expected = packed_outputs(model, documents)
        torch.save(model, tmp_path / "model.pt")
        copies = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
        with torch.no_grad():
            model.model.rotary_emb.inv_freq.mul_(0.5)
        for other in copies:
            assert torch.equal(packed_outputs(other, documents), expected)
        assert not torch.equal(packed_outputs(model, documents), expected)


@pytest.mark.parametrize("by_name", [False, True], ids=["patched", "by_name"])
def test_rotary_embeddings_that_are_replaced_after_patching(by_name):
    model, other = (make_rotary_model("llama", rope_theta=theta) for theta in (1e4, 1e2))
    documents = make_documents([80, 9])
    for either in (model, other):
        if by_name:
            either.set_attn_implementation("lctrain_dual_chunk")
        else:
            patch_model(either, attention="dual_chunk")
    expected = packed_outputs(other, documents)
    assert not torch.equal(packed_outputs(model, documents), expected)
    model.model.rotary_emb = other.model.rotary_emb
    assert torch.equal(packed_outputs(model, documents), expected)


def test_the_inner_model_may_be_called_by_itself():
    model, documents = make_rotary_model("llama"), make_documents([80, 9])
    with patch_model(model, attention="dual_chunk"):
        logits = packed_outputs(model, documents)
        assert torch.equal(model.lm_head(packed_outputs(model.model, documents)), logits)


def test_a_layer_called_by_itself():
    model = make_rotary_model("llama")
    arguments = {
        "position_embeddings": (torch.ones(1, 4, 8), torch.zeros(1, 4, 8)),
        "attention_mask": None,
    }
    message = "must be reached through the patched model"
    with patch_model(model, attention="dual_chunk"), pytest.raises(ValueError, match=message):
        model.model.layers[0].self_attn(torch.randn(1, 4, 32), **arguments)


# Loaded by name.


@pytest.fixture
def load(tmp_path):
    """Returns load(family, **config): a tiny model, and the same model as lctrain_dual_chunk."""

    def by_name(family, **config):
        model = make_rotary_model(family, **config)
        model.save_pretrained(tmp_path)
        return model, AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="lctrain_dual_chunk"
        )

    return by_name


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.usefixtures("in_float64_but_frequencies")
def test_from_pretrained_by_name_is_patched_with_the_defaults(load, family):
    model, loaded = load(family, dual_chunk_attention_config=PUBLISHED)
    documents = make_documents([80, 9, 40])
    input_ids, mask = padded(documents, "left")
    with torch.no_grad():
        found = packed_outputs(loaded, documents)
        found_padded = outputs(loaded, input_ids=input_ids, attention_mask=mask)
        with patch_model(model, attention="dual_chunk"):
            assert_equal_in_float64(found, packed_outputs(model, documents))
            expected = outputs(model, input_ids=input_ids, attention_mask=mask)
    assert_equal_in_float64(found_padded[mask.bool()], expected[mask.bool()])


def test_generate_by_name(load):
    model, loaded = load("llama", max_position_embeddings=16)
    prompt = make_documents([14])[0][None]
    options = {"max_new_tokens": 20, "do_sample": False}
    found = loaded.generate(prompt, **options)
    with patch_model(model, attention="dual_chunk"):
        assert torch.equal(model.generate(prompt, **options), found)


@pytest.mark.usefixtures("in_float64_but_frequencies")
def test_the_inner_model_by_name(load):
    model, loaded = load("llama")
    documents = make_documents([80, 9])
    with patch_model(model, attention="dual_chunk"):
        expected = packed_outputs(model.model, documents)
    assert_equal_in_float64(packed_outputs(loaded.model, documents), expected)


def test_patching_a_model_that_was_loaded_by_name(load):
    _, loaded = load("llama")
    documents = make_documents([80])
    for used in (False, True):
        by_name = packed_outputs(loaded, documents) if used else None
        with patch_model(loaded, attention="dual_chunk", chunk_size=31):
            patched = packed_outputs(loaded, documents)
        with patch_model(loaded):
            flash = packed_outputs(loaded, documents)
        assert not torch.equal(patched, flash)
        if used:
            assert torch.equal(packed_outputs(loaded, documents), by_name)
            assert not torch.equal(by_name, patched)


@pytest.mark.usefixtures("in_float64_but_frequencies")
def test_set_attn_implementation_there_and_back():
    model, documents = make_rotary_model("llama"), make_documents([80])
    plain = separate_outputs(model, documents)
    model.set_attn_implementation("lctrain_dual_chunk")
    found = separate_outputs(model, documents)
    assert not torch.equal(found, plain)
    model.set_attn_implementation("sdpa")
    assert torch.equal(separate_outputs(model, documents), plain)
    model.set_attn_implementation("lctrain_flash")
    assert_equal_in_float64(separate_outputs(model, documents), plain)
    model.set_attn_implementation("lctrain_dual_chunk")
    assert torch.equal(separate_outputs(model, documents), found)
    with patch_model(make_rotary_model("llama"), attention="dual_chunk") as handle:
        assert_equal_in_float64(packed_outputs(handle.model, documents), found)


def test_models_that_cannot_have_it_are_refused_by_name_in_the_first_forward():
    config = CohereConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config._attn_implementation = "lctrain_dual_chunk"
    model = CohereForCausalLM(config)
    with pytest.raises(ValueError, match="in halves, as Llama does"):
        model(make_documents([9])[0][None])


def test_windows_are_refused_by_name():
    model = make_model("mistral", attn_implementation="lctrain_dual_chunk")
    with pytest.raises(ValueError, match="got a sliding window in MistralAttention"):
        model(make_documents([9])[0][None])
