"""Tests documents told apart by `seq_idx`, as by transformers' DataCollatorWithFlattening."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from lctrain.models import patch_model
from tests.models.families import make_documents, make_model, outputs, separate_outputs
from tests.numerics import assert_equal_in_float64


@pytest.fixture(params=["patched", "by-name"])
def switch(request):
    """Returns switch(model), which gives a model lctrain's attention in one of two ways."""
    if request.param == "patched":
        return patch_model
    return lambda model: model.set_attn_implementation("lctrain_flash")


def row_of(documents, index=(4, 0, 9)):
    seq_idx = torch.cat([torch.full((len(t),), i) for t, i in zip(documents, index, strict=False)])
    return torch.cat(documents)[None], seq_idx[None].int()


@torch.no_grad()
@pytest.mark.parametrize("positions", [False, True], ids=["counted", "given"])
@pytest.mark.usefixtures("in_float64")
def test_seq_idx_alone_keeps_documents_apart(switch, positions):
    model, documents = make_model("llama"), make_documents((6, 11, 7))
    expected = separate_outputs(model, documents)
    switch(model)
    tokens, seq_idx = row_of(documents)
    restarting = torch.cat([torch.arange(len(t)) for t in documents])[None]
    given = {"position_ids": restarting} if positions else {}
    found = outputs(model, input_ids=tokens, seq_idx=seq_idx, **given)
    assert_equal_in_float64(found[0], expected)


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
def test_padding_beside_seq_idx(switch):
    model, documents = make_model("llama"), make_documents((6, 11, 7))
    expected = separate_outputs(model, documents)
    switch(model)
    tokens, seq_idx = (torch.nn.functional.pad(x, (0, 3), value=0) for x in row_of(documents))
    mask = torch.ones_like(tokens)
    mask[:, -3:] = 0
    by_mask = outputs(model, input_ids=tokens, seq_idx=seq_idx, attention_mask=mask)
    assert_equal_in_float64(by_mask[0, :-3], expected)
    seq_idx[:, -3:] = -1
    assert_equal_in_float64(outputs(model, input_ids=tokens, seq_idx=seq_idx)[0, :-3], expected)


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
def test_flattening_collator(switch):
    model, documents = make_model("llama"), make_documents((6, 11, 7))
    expected = separate_outputs(model, documents)
    switch(model)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate([{"input_ids": tokens.tolist()} for tokens in documents])
    del batch["labels"]
    assert_equal_in_float64(outputs(model, **batch)[0], expected)


@torch.no_grad()
def test_refusals(switch):
    model = make_model("llama").eval()
    switch(model)
    tokens, seq_idx = row_of(make_documents((6, 11, 7)))
    refused = {
        r"seq_idx must be integers of the inputs' shape \[1, 24\]": {"seq_idx": seq_idx[:, :5]},
        r"seq_idx must be integers .* got torch.float32": {"seq_idx": seq_idx.float()},
        "document_ids must be None": {"document_ids": seq_idx},
        "block_sequence_ids must be None": {"block_sequence_ids": seq_idx},
        "beside seq_idx": {"seq_idx": seq_idx, "attention_mask": (seq_idx == 4).long() + 1},
    }
    for message, given in refused.items():
        with pytest.raises(ValueError, match=message):
            model(input_ids=tokens, **given)
    cache = model(input_ids=tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="seq_idx must be None on top of a filled"):
        model(input_ids=tokens, seq_idx=seq_idx, past_key_values=cache)
