"""Tests models with learned positions: how many they have, and where documents must begin."""

import pytest
import torch
import transformers

from lctrain.models import patch_model
from lctrain.models.positions import position_limit
from tests.models.families import make_documents, outputs, packed_outputs, separate_outputs
from tests.models.tiny import tiny_config, tiny_model
from tests.numerics import assert_equal_in_float64

TABLES = {  # family -> class, positions that its tiny config leaves to tokens
    "bert": ("BertLMHeadModel", 64),
    "biogpt": ("BioGptForCausalLM", 64),
    "ctrl": ("CTRLLMHeadModel", 64),
    "electra": ("ElectraForCausalLM", 64),
    "ernie": ("ErnieForCausalLM", 64),
    "gpt2": ("GPT2LMHeadModel", 64),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", 64),
    "opt": ("OPTForCausalLM", 64),
}
OWN_COUNT = {"bart": ("BartForCausalLM", 64), "roberta": ("RobertaForCausalLM", 63)}
COMPUTED = {
    "llama": "LlamaForCausalLM",
    "modernbert": "ModernBertForMaskedLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}


FROM_PADDING = {  # family -> class; they count from padding_idx + 1
    "camembert": "CamembertForMaskedLM",
    "data2vec-text": "Data2VecTextForMaskedLM",
    "roberta": "RobertaForCausalLM",
    "roberta-prelayernorm": "RobertaPreLayerNormForMaskedLM",
    "xlm-roberta": "XLMRobertaForMaskedLM",
    "xlm-roberta-xl": "XLMRobertaXLForCausalLM",
    "xmod": "XmodForMaskedLM",
}
UNTOLD = {  # family -> class; they take no position ids
    "bart": "BartForCausalLM",
    "blenderbot-small": "BlenderbotSmallForCausalLM",
    "marian": "MarianForCausalLM",
    "pegasus": "PegasusForCausalLM",
    "plbart": "PLBartForCausalLM",
    "whisper": "WhisperForCausalLM",
}


def make(family, name):
    torch.manual_seed(0)
    return getattr(transformers, name)(tiny_config(family)).eval()


@pytest.mark.parametrize("family", TABLES)
def test_a_document_that_fills_the_table_and_one_that_does_not_fit(family):
    name, limit = TABLES[family]
    model = make(family, name)
    assert position_limit(model) == limit
    with patch_model(model), torch.no_grad():
        fitting = make_documents([limit, 3])  # the row is longer than the table
        assert packed_outputs(model, fitting).isfinite().all()
        message = f"documents must be at most {limit}, .* in the table of {name}, got {limit + 1}"
        with pytest.raises(ValueError, match=message):
            packed_outputs(model, make_documents([3, limit + 1]))
    with pytest.raises((IndexError, RuntimeError)):  # what it would be without
        separate_outputs(model, make_documents([limit + 1]))


@pytest.mark.parametrize("family", OWN_COUNT)
def test_models_that_count_positions_themselves(family):
    name, limit = OWN_COUNT[family]
    model = make(family, name)
    assert position_limit(model) == limit
    with patch_model(model), torch.no_grad():
        assert model(make_documents([limit])[0][None]).logits.isfinite().all()
        with pytest.raises(ValueError, match=f"documents must be at most {limit}"):
            model(make_documents([limit + 1])[0][None])


@pytest.mark.parametrize("family", COMPUTED)
def test_computed_positions_have_no_end(family):
    assert position_limit(make(family, COMPUTED[family])) is None


def switch(model, by_name):
    model.set_attn_implementation("lctrain_flash") if by_name else patch_model(model)


def row_of(documents, first=0):
    positions = torch.cat([torch.arange(first, first + len(tokens)) for tokens in documents])
    return {"input_ids": torch.cat(documents)[None], "position_ids": positions[None]}


@pytest.mark.parametrize("by_name", [False, True], ids=["patched", "by-name"])
@pytest.mark.parametrize("family", FROM_PADDING)
@pytest.mark.usefixtures("in_float64")
def test_documents_begin_where_the_model_counts_from(family, by_name):
    model = tiny_model(family, getattr(transformers, FROM_PADDING[family]), pad_token_id=1)
    documents = [tokens.clamp(min=2) for tokens in make_documents((6, 1, 11))]
    with torch.no_grad():
        expected = separate_outputs(model, documents)
        switch(model, by_name)
        found = outputs(model, **row_of(documents, first=2), use_cache=False)[0]
        assert_equal_in_float64(found, expected)
        message = f"position_ids must begin at 2 in every document of {FROM_PADDING[family]}.* got "
        with pytest.raises(ValueError, match=message + "0"):
            model(**row_of(documents), use_cache=False)
        numbered = torch.tensor([[1] * 6 + [2] + [3] * 11])
        with pytest.raises(ValueError, match=message + "1"):
            model(**row_of(documents, first=1), attention_mask=numbered, use_cache=False)


@pytest.mark.parametrize("by_name", [False, True], ids=["patched", "by-name"])
@pytest.mark.parametrize("family", UNTOLD)
def test_a_model_that_takes_no_position_ids_cannot_be_told_documents_by_them(family, by_name):
    model = tiny_model(family, getattr(transformers, UNTOLD[family]))
    switch(model, by_name)
    documents = make_documents((6, 1, 11))
    numbered = torch.tensor([[1] * 6 + [2] + [3] * 11])
    for extra in ({}, {"attention_mask": numbered}, {"seq_idx": numbered}):
        with pytest.raises(ValueError, match=r"restart at 0 per document, got .* counts them itse"):
            model(**row_of(documents), **extra, use_cache=False)
    with torch.no_grad():  # a single document is as before
        assert model(**row_of(documents[:1]), use_cache=False).logits.isfinite().all()
