"""transformers knows lctrain_flash as soon as lctrain is imported, and loads models with it."""

import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import lctrain  # noqa: F401  (registers)
from lctrain.models.registration import register
from tests.models.families import (
    CAUSAL,
    FAMILIES,
    make_documents,
    make_model,
    outputs,
    packed_outputs,
    separate_outputs,
)


@pytest.fixture
def load(tmp_path):
    """Returns load(family, **options): a saved tiny model, loaded by name."""

    def by_name(family, **options):
        model = make_model(family)
        model.save_pretrained(tmp_path / family)
        return model, type(model).from_pretrained(
            tmp_path / family, attn_implementation="lctrain_flash", **options
        ).eval()

    return by_name


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained(load, family):
    model, loaded = load(family)
    documents = make_documents()
    assert loaded.config._attn_implementation == "lctrain_flash"
    with torch.no_grad():
        expected = separate_outputs(model, documents)
        torch.testing.assert_close(separate_outputs(loaded, documents), expected)
        torch.testing.assert_close(packed_outputs(loaded, documents), expected)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("use_cache", [False, True])
def test_restarting_position_ids_without_patch_model(load, family, use_cache):
    """With the cache on, as it is by default, transformers' own masks let documents leak here."""
    model, loaded = load(family)
    documents = make_documents()
    positions = torch.cat([torch.arange(len(tokens)) for tokens in documents])[None]
    with torch.no_grad():
        rows = {"input_ids": torch.cat(documents)[None], "position_ids": positions}
        found = outputs(loaded, **rows, use_cache=use_cache)
        expected = separate_outputs(model, documents)
    torch.testing.assert_close(found[0], expected)


def test_auto_model_and_padding(tmp_path):
    model = make_model("mistral")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lctrain_flash")
    rows = torch.stack(make_documents([9, 9]))
    mask = torch.ones_like(rows)
    mask[0, 6:] = 0
    with torch.no_grad():
        found, expected = (m.eval()(rows, attention_mask=mask).logits for m in (loaded, model))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


def test_generate_with_a_model_loaded_by_name(load):
    model, loaded = load("gemma2")
    prompt = make_documents([5])[0][None]
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(prompt, **options), model.generate(prompt, **options))


def test_set_attn_implementation():
    model, documents = make_model("llama"), make_documents()
    expected = separate_outputs(model, documents)
    model.set_attn_implementation("lctrain_flash")
    torch.testing.assert_close(packed_outputs(model, documents), expected)


def test_models_with_other_masks_are_refused_by_name():
    config = transformers.Llama4TextConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    with torch.device("meta"), pytest.raises(ValueError, match="_supports_flash_attn is False"):
        AutoModelForCausalLM.from_config(config, attn_implementation="lctrain_flash")


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
