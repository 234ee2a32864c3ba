"""Compares a pack's outputs and gradients with those of its documents one by one."""

import copy

import pytest
import torch

from lctrain.models import patch_model
from tests.models.families import (
    FAMILIES,
    gradients,
    make_documents,
    make_model,
    packed_outputs,
    separate_outputs,
)
from tests.numerics import assert_equal_in_float64, assert_error_at_most_twice


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("float64_stays_float64")
def test_outputs_and_all_gradients(family):
    model, documents = make_model(family), make_documents()
    exact = copy.deepcopy(model).double()
    reference, reference_grads = gradients(exact, lambda: separate_outputs(exact, documents))
    plain, plain_grads = gradients(model, lambda: separate_outputs(model, documents))
    with patch_model(model):
        packed, packed_grads = gradients(model, lambda: packed_outputs(model, documents))
    with patch_model(exact):
        exactly, exact_grads = gradients(exact, lambda: packed_outputs(exact, documents))

    assert_error_at_most_twice(packed, plain, reference, "outputs")
    assert_equal_in_float64(exactly, reference)
    assert packed_grads.keys() == plain_grads.keys() == exact_grads.keys() != set()
    for name, reference_grad in reference_grads.items():
        assert_equal_in_float64(exact_grads[name], reference_grad, name)
    every = sorted(reference_grads)
    assert_error_at_most_twice(
        *(
            torch.cat([grads[name].flatten() for name in every])
            for grads in (packed_grads, plain_grads, reference_grads)
        ),
        "gradients",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_position_ids_alone_keep_documents_apart(family):
    model, documents = make_model(family), make_documents()
    positions = torch.cat([torch.arange(len(tokens)) for tokens in documents])[None]
    with patch_model(model), torch.no_grad():
        expected = packed_outputs(model, documents)
        absent = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))
        by_positions = packed_outputs(
            model, documents, **absent, position_ids=positions, use_cache=None
        )
    assert torch.equal(by_positions, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_boundaries_alone_give_the_positions(family):
    model, documents = make_model(family), make_documents()
    with patch_model(model), torch.no_grad():
        expected = packed_outputs(model, documents)
        assert torch.equal(packed_outputs(model, documents, position_ids=None), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "modernbert"])
def test_changing_one_document_keeps_every_bit_of_the_others(family):
    model, documents = make_model(family), make_documents()
    changed = [tokens.clone() for tokens in documents]
    changed[2] = 3 + (changed[2] + 1 - 3) % (61 - 3)
    edges = torch.tensor([len(tokens) for tokens in documents]).cumsum(0).tolist()
    others = [*range(edges[1]), *range(edges[2], edges[3])]
    with patch_model(model):
        before = _outputs_and_input_gradients(model, documents)
        after = _outputs_and_input_gradients(model, changed)
    for name in before:
        assert torch.equal(before[name][others], after[name][others]), name
    inside = slice(edges[1], edges[2])
    assert not torch.equal(before["outputs"][inside], after["outputs"][inside])


def _outputs_and_input_gradients(model, documents):
    embeddings = model.get_input_embeddings()(torch.cat(documents)[None]).detach()
    embeddings.requires_grad_()
    out = packed_outputs(model, documents, input_ids=None, inputs_embeds=embeddings)
    out.square().sum().backward()
    return {"outputs": out.detach(), "gradients": embeddings.grad[0]}


@pytest.mark.usefixtures("float64_stays_float64")
def test_padding_after_packed_rows_is_dropped():
    """Values in the padding change no bit; without padding only the products' blocking differs."""
    documents, padding = make_documents(), 5
    tokens = torch.cat(documents)
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    mask = torch.arange(len(tokens) + padding)[None] < len(tokens)

    def padded(model, filler):
        with patch_model(model), torch.no_grad():
            logits = model(
                torch.nn.functional.pad(tokens, (0, padding), value=filler)[None],
                attention_mask=mask.long(),
                position_ids=torch.nn.functional.pad(positions, (0, padding))[None],
            ).logits
        return logits[0, : len(tokens)]

    model = make_model("llama")
    found = padded(model, 0)
    assert torch.equal(found, padded(model, 7))
    with torch.no_grad():
        with patch_model(model):
            plain = packed_outputs(model, documents)
        exact = make_model("llama").double()
        with patch_model(exact):
            reference = packed_outputs(exact, documents)
    assert_error_at_most_twice(found, plain, reference)
