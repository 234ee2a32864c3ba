"""Tests attention masks that number documents (`1 1 1 2 2 3`), and masks that are not padding."""

import copy

import pytest
import torch

from lctrain.models import patch_model
from tests.float64 import float64_throughout
from tests.models.families import (
    FAMILIES,
    gradients,
    make_documents,
    make_model,
    make_rotary_model,
    outputs,
    padded,
    separate_outputs,
)
from tests.numerics import assert_equal_in_float64, assert_error_at_most_twice

LENGTHS = (6, 1, 11, 7)


def rows_of(documents, padding=3):
    """Returns two rows, their numbered mask, and their documents.

    The first row holds all documents and then padding, the second padding and then two documents.
    """
    numbers = torch.cat([torch.full((len(t),), i + 1) for i, t in enumerate(documents)])
    first = torch.cat([*documents, torch.zeros(padding, dtype=torch.int64)])
    two = documents[0], documents[2]
    second = torch.zeros_like(first)
    second[-17:] = torch.cat(two)
    mask = torch.zeros(2, len(first), dtype=torch.int64)
    mask[0, : len(numbers)] = numbers
    mask[1, -17:] = torch.tensor([7] * 6 + [3] * 11)  # any numbers, in one piece each
    return torch.stack([first, second]), mask, [*documents, *two]


def position_ids_of(mask):
    return torch.stack(
        [
            torch.cat([torch.arange(n) for n in row.unique_consecutive(return_counts=True)[1]])
            for row in mask
        ]
    )


@pytest.mark.parametrize("positions", [False, True], ids=["positions-counted", "positions-given"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("float64_stays_float64")
def test_documents_are_split_at_the_numbers(family, positions):
    model = make_model(family).double()
    rows, mask, documents = rows_of(make_documents(LENGTHS))
    given = {"position_ids": position_ids_of(mask)} if positions else {}
    expected, wanted = gradients(model, lambda: separate_outputs(model, documents))
    patch_model(model)

    def run():
        return outputs(model, input_ids=rows, attention_mask=mask, **given)[mask > 0]

    found, got = gradients(model, run)
    assert_equal_in_float64(found, expected)
    assert_equal_in_float64(got, wanted)


@torch.no_grad()
@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.uint8, torch.float32, torch.bfloat16], ids=str
)
@pytest.mark.usefixtures("in_float64")
def test_dtypes(dtype):
    model = make_model("llama")
    rows, mask, documents = rows_of(make_documents(LENGTHS))
    expected = separate_outputs(model, documents)
    patch_model(model)
    found = outputs(model, input_ids=rows, attention_mask=mask.to(dtype))[mask > 0]
    assert_equal_in_float64(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["flash", "dual_chunk"])
def test_by_name_and_in_dual_chunk(attention):
    model = make_rotary_model("llama")
    rows, mask, documents = rows_of(make_documents(LENGTHS))
    expected = separate_outputs(model, documents)
    with float64_throughout():
        exact = separate_outputs(copy.deepcopy(model).double(), documents)
    model.set_attn_implementation(f"lctrain_{attention}")
    found = outputs(model, input_ids=rows, attention_mask=mask)[mask > 0]
    assert_error_at_most_twice(found, expected, exact)
    inner = model.model(input_ids=rows, attention_mask=mask).last_hidden_state
    assert_error_at_most_twice(model.lm_head(inner)[mask > 0], expected, exact)


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
def test_positions_also_end_documents():
    model, documents = make_model("llama"), make_documents((4, 5, 6))
    expected = separate_outputs(model, documents)
    patch_model(model)
    found = outputs(
        model,
        input_ids=torch.cat(documents)[None],
        attention_mask=torch.tensor([[1] * 9 + [2] * 6]),
        position_ids=torch.cat([torch.arange(n) for n in (4, 5, 6)])[None],
    )
    assert_equal_in_float64(found[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("in_float64")
def test_padding_in_any_dtype(dtype):
    model, documents = make_model("llama"), make_documents((5, 9))
    rows, mask = padded(documents, "left")
    expected = separate_outputs(model, documents)
    patch_model(model)
    found = outputs(model, input_ids=rows, attention_mask=mask.to(dtype))[mask.bool()]
    assert_equal_in_float64(found, expected)


ADDITIVE = torch.tensor([[0.0] * 5 + [torch.finfo(torch.float32).min] * 2])
BAD = {
    "additive": (ADDITIVE, r"got torch.float32 values from -3.4.* \(an additive mask\?\)"),
    "infinite": (
        torch.tensor([[float("inf")] * 3 + [1.0] * 4]),
        r"values from 1 to inf \(an additive mask\?\)",
    ),
    "additive-open": (torch.zeros(1, 7), r"values from 0 to 0 \(an additive mask\?\)"),
    "fractions": (torch.full((1, 7), 0.5), "values from 0.5 to 0.5"),
    "negative": (torch.tensor([[1, 1, 1, -1, -1, 1, 1]]), "number documents from 1, got -1"),
    "returning": (torch.tensor([[1, 1, 2, 2, 1, 1, 0]]), "a number that comes back"),
    "4-D": (
        torch.ones(1, 1, 7, 7, dtype=torch.bool),
        r"must be \[batch, tokens\], got \[1, 1, 7, 7",
    ),
    "4-D floats": (torch.zeros(1, 1, 7, 7), r"must be \[batch, tokens\], got \[1, 1, 7, 7"),
    "3-D": (torch.ones(1, 7, 7), r"must be \[batch, tokens\], got \[1, 7, 7"),
    "per layer": (
        {"full_attention": torch.ones(1, 1, 7, 7)},
        r"must be \[batch, tokens\], got the masks of an outer model",
    ),
}


@pytest.mark.parametrize("by_name", [False, True], ids=["patched", "by-name"])
@pytest.mark.parametrize("case", BAD)
def test_other_masks_are_refused(case, by_name):
    mask, message = BAD[case]
    model = make_model("llama")
    model.set_attn_implementation("lctrain_flash") if by_name else patch_model(model)
    with pytest.raises(ValueError, match=message):
        model(input_ids=make_documents([7])[0][None], attention_mask=mask)


@torch.no_grad()
def test_numbers_and_a_cache_exclude_one_another():
    model = make_model("llama")
    patch_model(model)
    tokens = make_documents([7])[0][None]
    numbers = torch.tensor([[1, 1, 1, 2, 2, 2, 2]])
    with pytest.raises(ValueError, match="attention_mask must not number documents while"):
        model(input_ids=tokens, attention_mask=numbers, use_cache=True)
    with pytest.raises(ValueError, match="attention_mask must not number documents while"):
        model.generate(tokens, attention_mask=numbers, max_new_tokens=2)
    cache = model(input_ids=tokens[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="0 or 1 on top of a filled key/value cache"):
        model(input_ids=tokens[:, 5:], attention_mask=numbers, past_key_values=cache)


@pytest.mark.usefixtures("in_float64")
def test_positions_that_a_model_counts_itself():
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    model, documents = transformers.RobertaModel(config).eval(), make_documents([3, 2])
    with torch.no_grad():
        expected = separate_outputs(model, documents)
        patch_model(model)
        numbers = torch.tensor([[1, 1, 1, 2, 2]])
        found = outputs(model, input_ids=torch.cat(documents)[None], attention_mask=numbers)[0]
    assert_equal_in_float64(found, expected)
