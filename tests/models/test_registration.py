"""Tests that importing lctrain registers lctrain_flash, by which transformers loads models."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import lctrain  # noqa: F401  (registers)
from lctrain.models import patch_model
from lctrain.models.registration import register
from tests.float64 import float64_throughout
from tests.models.families import (
    CAUSAL,
    FAMILIES,
    make_documents,
    make_model,
    outputs,
    packed_outputs,
    separate_outputs,
)
from tests.models.tiny import tiny_config, tiny_model
from tests.numerics import assert_equal_in_float64, assert_error_at_most_twice


@pytest.fixture
def load(tmp_path):
    """Returns load(family, **options), which saves a tiny model and loads it with lctrain_flash."""

    def by_name(family, **options):
        model = make_model(family)
        model.save_pretrained(tmp_path / family)
        loaded = type(model).from_pretrained(
            tmp_path / family, attn_implementation="lctrain_flash", **options
        )
        loaded.config._experts_implementation = "eager"  # the others know no float64
        return model, loaded.eval()

    return by_name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("in_float64")
def test_from_pretrained(load, family):
    model, loaded = load(family)
    documents = make_documents()
    assert loaded.config._attn_implementation == "lctrain_flash"
    with torch.no_grad():
        expected = separate_outputs(model, documents)
        assert_equal_in_float64(separate_outputs(loaded, documents), expected)
        assert_equal_in_float64(packed_outputs(loaded, documents), expected)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("use_cache", [False, None])
@pytest.mark.usefixtures("in_float64")
def test_restarting_position_ids_without_patch_model(load, family, use_cache):
    """With the cache on, as by default, transformers' own masks would let documents leak."""
    model, loaded = load(family)
    documents = make_documents()
    positions = torch.cat([torch.arange(len(tokens)) for tokens in documents])[None]
    with torch.no_grad():
        rows = {"input_ids": torch.cat(documents)[None], "position_ids": positions}
        found = outputs(loaded, **rows, use_cache=use_cache)
        expected = separate_outputs(model, documents)
    assert_equal_in_float64(found[0], expected)


@pytest.mark.usefixtures("in_float64")
def test_auto_model_and_padding(tmp_path):
    model = make_model("mistral")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lctrain_flash")
    rows = torch.stack(make_documents([9, 9]))
    mask = torch.ones_like(rows)
    mask[0, 6:] = 0
    with torch.no_grad():
        found, expected = (m.eval()(rows, attention_mask=mask).logits for m in (loaded, model))
    assert_equal_in_float64(found[mask.bool()], expected[mask.bool()])


def test_generate_with_a_model_loaded_by_name(load):
    model, loaded = load("gemma2")
    prompt = make_documents([5])[0][None]
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(prompt, **options), model.generate(prompt, **options))


@pytest.mark.usefixtures("in_float64")
def test_set_attn_implementation():
    model, documents = make_model("llama"), make_documents()
    expected = separate_outputs(model, documents)
    model.set_attn_implementation("lctrain_flash")
    assert_equal_in_float64(packed_outputs(model, documents), expected)


def test_a_cache_beside_packed_rows_is_refused_as_patched(load):
    _, loaded = load("llama")
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="must not restart while a key/value cache is filled"):
        loaded(make_documents([5])[0][None], position_ids=positions, use_cache=True)


REFUSED = (  # family of tests.models.tiny, class, what patch_model says
    ("bloom", "BloomForCausalLM", "got BloomForCausalLM, for which transformers says otherwise"),
    ("falcon", "FalconForCausalLM", "must call attention through .* in Falcon"),
    ("lfm2", "Lfm2ForCausalLM", "attention only, got Lfm2ForCausalLM with .*conv"),
    ("llama4_text", "Llama4ForCausalLM", "got Llama4ForCausalLM, for which transformers says"),
    ("phimoe", "PhimoeForCausalLM", "hand their sliding window to the attention function"),
    ("qwen3_next", "Qwen3NextForCausalLM", "attention only, got Qwen3Next.*linear_attention"),
    ("stablelm", "StableLmForCausalLM", "StableLmDecoderLayer drops them"),
)


@pytest.mark.parametrize(("family", "name", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_models_that_patch_model_refuses_are_refused_by_name(family, name, message, tmp_path):
    """The error is raised before a model exists."""
    by_name = {"attn_implementation": "lctrain_flash"}
    windows = {"sliding_window": 4} if family == "phimoe" else {}
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(tiny_config(family, **windows), **by_name)
    model_class = getattr(transformers, name)
    plain = model_class(tiny_config(family, **windows))
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        model_class.from_pretrained(tmp_path, **by_name)
    if plain._can_set_attn_implementation():
        with pytest.raises(ValueError, match=message):
            plain.set_attn_implementation("lctrain_flash")
        assert plain.config._attn_implementation != "lctrain_flash"


def test_several_modalities_are_refused_by_name_and_their_language_model_is_not():
    config = tiny_config("llava")
    with pytest.raises(ValueError, match="must be one text model, got LlavaForCond"):
        transformers.LlavaForConditionalGeneration._from_config(
            config, attn_implementation="lctrain_flash"
        )
    model = transformers.LlavaForConditionalGeneration(tiny_config("llava"))
    model.get_decoder().set_attn_implementation("lctrain_flash")
    assert model.get_decoder().config._attn_implementation == "lctrain_flash"


@pytest.mark.usefixtures("in_float64")
def test_a_model_whose_class_never_says_that_it_is_complete():
    """The class does not call post_init, so the model is checked in its first forward."""

    class Silent(transformers.LlamaForCausalLM):
        def post_init(self):
            pass

    config = make_model("llama").config
    config._attn_implementation = "lctrain_flash"
    documents = make_documents()
    model = Silent(config).eval()
    with torch.no_grad():
        found = packed_outputs(model, documents)
        assert_equal_in_float64(found, separate_outputs(model, documents))
    again = transformers.LlamaForCausalLM(config)
    assert [hook.hook is None for hook in again._forward_pre_hooks.values()] == [True]
    del model
    again = transformers.LlamaForCausalLM(config)
    assert [hook.hook is None for hook in again._forward_pre_hooks.values()] == [False]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_encoders_told_by_position_ids_alone(load, family):
    model, loaded = load(family)
    documents = make_documents()
    positions = torch.cat([torch.arange(len(tokens)) for tokens in documents])[None]
    rows = {"input_ids": torch.cat(documents)[None], "position_ids": positions}
    with torch.no_grad():
        with patch_model(model):
            expected = outputs(model, **rows)
        assert torch.equal(outputs(loaded, **rows), expected)


def test_two_attentions_in_turn():
    model, documents = make_model("llama"), make_documents()
    expected = separate_outputs(model, documents)
    with float64_throughout():
        exact = separate_outputs(copy.deepcopy(model).double(), documents)
    for name in ("lctrain_flash", "lctrain_dual_chunk", "lctrain_flash", "sdpa", "lctrain_flash"):
        model.set_attn_implementation(name)
        if name != "sdpa":
            assert_error_at_most_twice(packed_outputs(model, documents), expected, exact)
    with patch_model(model):
        assert_error_at_most_twice(packed_outputs(model, documents), expected, exact)


def test_other_names_are_judged_by_transformers():
    with pytest.raises((ValueError, ImportError)):
        make_model("llama", attn_implementation="lctrain_nonsense")


def test_registering_twice_changes_nothing():
    before = transformers.PreTrainedModel._check_and_adjust_attn_implementation
    register()
    assert transformers.PreTrainedModel._check_and_adjust_attn_implementation is before


@pytest.mark.parametrize(
    "code",
    [
        """
        import sys
        import lctrain
        assert "transformers" not in sys.modules, "lctrain imported transformers"
        import lctrain.kernels
        assert "transformers" not in sys.modules, "lctrain.kernels imported transformers"
        from transformers.modeling_utils import AttentionInterface
        """,
        """
        from transformers.modeling_utils import AttentionInterface
        import lctrain
        """,
    ],
    ids=["lctrain_first", "transformers_first"],
)
def test_importing_lctrain_is_enough(code, tmp_path):
    check = """
        from transformers.masking_utils import AttentionMaskInterface
        for name in ("lctrain_flash", "lctrain_dual_chunk", "lctrain_differential"):
            assert name in AttentionInterface().keys()
            assert name in AttentionMaskInterface().keys()
        import importlib.machinery, sys
        import transformers.modeling_utils as module
        assert isinstance(module.__spec__.loader, importlib.machinery.SourceFileLoader)
        assert not any("lctrain" in type(finder).__module__ for finder in sys.meta_path)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code) + textwrap.dedent(check)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", ["phimoe", "lfm2", "llama"])
def test_a_name_set_in_the_config_goes_past_no_check(family):
    """Without the check Phimoe would lose its window, and LFM2 would mix documents."""
    name = {"phimoe": "Phimoe", "lfm2": "Lfm2", "llama": "Llama"}[family]
    model = tiny_model(family, getattr(transformers, f"{name}ForCausalLM"))
    model.config._attn_implementation = "lctrain_flash"
    with pytest.raises(ValueError, match=r"was not checked.*Call lctrain.patch_model\(model\)"):
        model(input_ids=torch.arange(3, 9)[None])
    if family == "llama":
        patch_model(model)
        model(input_ids=torch.arange(3, 9)[None])
    else:
        with pytest.raises(ValueError, match="must"):
            patch_model(model)
