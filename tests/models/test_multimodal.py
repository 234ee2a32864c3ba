"""Tests multimodal models: the wrapper is refused, its language model takes packs."""

import copy
import functools

import pytest
import torch
import transformers

from lctrain.models import patch_model
from tests.models.families import make_documents, outputs, packed_outputs, separate_outputs
from tests.models.tiny import tiny_model
from tests.numerics import assert_error_at_most_twice

PASSES_PACKS = {  # wrappers that hand a text-only pack to their language model as it is
    "llava": "LlavaForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "glm4v": "Glm4vForConditionalGeneration",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
}
MAKES_MASKS = {  # wrappers that make masks of their own
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
}
WRAPPERS = PASSES_PACKS | MAKES_MASKS
M_ROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
TEXT_ONLY = {"text_config": "lctrain_flash"}
OUTER_MASK = r"an outer model.*model\.get_decoder\(\)"


@functools.cache
def _built(family):
    return tiny_model(family, getattr(transformers, WRAPPERS[family]))


@pytest.fixture
def make():
    """Returns make(family), which copies the family's tiny multimodal wrapper."""
    return lambda family: copy.deepcopy(_built(family))


def assert_right(found, plain, documents):
    """Compares packed outputs with each document's own outputs."""
    exact = copy.deepcopy(plain).double()
    assert_error_at_most_twice(
        found, separate_outputs(plain, documents), separate_outputs(exact, documents)
    )


@torch.no_grad()
@pytest.mark.parametrize("family", WRAPPERS)
def test_the_wrapper_s_error_has_a_remedy_that_works(make, family):
    model, documents = make(family), make_documents()
    with pytest.raises(ValueError, match=r"must be one text model.* decoder = model.get_decoder\("):
        patch_model(model)
    plain, decoder = copy.deepcopy(model.get_decoder()), model.get_decoder()
    handle = patch_model(decoder)
    assert_right(packed_outputs(decoder, documents), plain, documents)
    if family in PASSES_PACKS:
        assert_right(packed_outputs(model, documents), make(family), documents)
    else:
        with pytest.raises(ValueError, match=OUTER_MASK):
            packed_outputs(model, documents)
    handle.unpatch()
    tokens = {"input_ids": documents[0][None], "use_cache": False}
    assert torch.equal(outputs(model, **tokens), outputs(make(family), **tokens))


@torch.no_grad()
@pytest.mark.parametrize("family", WRAPPERS)
def test_the_language_model_s_attention_by_name(make, family):
    model, documents = make(family), make_documents()
    with pytest.raises(ValueError, match=r"must be one text model|must have masks that are"):
        model.set_attn_implementation("lctrain_flash")
    model = make(family)
    model.set_attn_implementation(TEXT_ONLY)
    if family in PASSES_PACKS:
        assert_right(packed_outputs(model, documents), make(family), documents)
    else:
        with pytest.raises(ValueError, match=OUTER_MASK):
            packed_outputs(model, documents)


@torch.no_grad()
@pytest.mark.parametrize("family", M_ROPE)
def test_positions_of_several_axes(make, family):
    """M-RoPE has positions for time, height and width; the pack gives the boundaries."""
    decoder = make(family).get_decoder()
    exact, plain = copy.deepcopy(decoder).double(), copy.deepcopy(decoder)
    documents = make_documents()
    generator = torch.Generator().manual_seed(4)
    axes = [torch.randint(0, 9, (3, 1, len(d)), generator=generator).cumsum(-1) for d in documents]

    def separate(model):
        return torch.cat(
            [
                outputs(model, input_ids=d[None], position_ids=p, use_cache=False)[0]
                for d, p in zip(documents, axes, strict=True)
            ]
        )

    with patch_model(decoder):
        found = packed_outputs(decoder, documents, position_ids=torch.cat(axes, -1))
        assert_error_at_most_twice(found, separate(plain), separate(exact))
        with pytest.raises(ValueError, match=r"position_ids must be \[batch, tokens\]"):
            decoder(torch.cat(documents)[None], position_ids=torch.cat(axes, -1), use_cache=False)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("lfm2_vl", "Lfm2VlForConditionalGeneration", "cannot be patched alone, either: .*Conv1d"),
        ("git", "GitForCausalLM", "train it with one document per row"),
        ("blip-2", "Blip2ForConditionalGeneration", r"pixel_values.* decoder = model.get_decoder"),
    ],
)
def test_no_advice_that_fails(family, name, message):
    model = tiny_model(family, getattr(transformers, name))
    with pytest.raises(ValueError, match=message):
        patch_model(model)
    if "get_decoder" in message:
        patch_model(model.get_decoder())
    if family == "lfm2_vl":
        with pytest.raises(ValueError, match=r"attention only, got Lfm2Model with Conv1d"):
            model.set_attn_implementation(TEXT_ONLY)
