"""Tests that models with learned position embeddings name their limit before an index error."""

import pytest
import torch
import transformers

from lctrain.models import patch_model
from lctrain.models.positions import position_limit
from tests.models.families import make_documents, packed_outputs, separate_outputs
from tests.models.tiny import tiny_config

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
