"""Tests the inputs of a patched model: rows, padding, caches, and contradictory inputs."""

import pytest
import torch

from lctrain.batch import PackedBatch
from lctrain.models import patch_model
from tests.models.families import (
    CAUSAL,
    FAMILIES,
    make_documents,
    make_model,
    outputs,
    packed_outputs,
    padded,
    separate_outputs,
)
from tests.numerics import assert_equal_in_float64


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("in_float64")
def test_padding_is_never_seen(family, side):
    model, documents = make_model(family), make_documents()
    input_ids, mask = padded(documents, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with patch_model(model), torch.no_grad():
        out = outputs(model, input_ids=input_ids, attention_mask=mask, position_ids=positions)
        expected = packed_outputs(model, documents)
    assert_equal_in_float64(out[mask.bool()], expected)


@pytest.mark.usefixtures("in_float64")
def test_rows_without_padding_are_documents():
    model, documents = make_model("mistral"), make_documents([9, 9, 9])
    rows = torch.stack(documents)
    with patch_model(model), torch.no_grad():
        expected = packed_outputs(model, documents)
        for extra in ({}, {"attention_mask": torch.ones_like(rows)}):
            out = outputs(model, input_ids=rows, **extra)
            assert_equal_in_float64(out.flatten(0, 1), expected)


def test_positional_arguments():
    model, documents = make_model("llama"), make_documents([5, 9])
    input_ids, mask = padded(documents, "right")
    with patch_model(model), torch.no_grad():
        expected = model(input_ids=input_ids, attention_mask=mask).logits
        assert torch.equal(model(input_ids, mask).logits, expected)


@pytest.mark.parametrize("family", CAUSAL)
def test_generate_while_patched(family):
    model = make_model(family)
    input_ids, mask = padded(make_documents([5, 9]), "left")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(input_ids, attention_mask=mask, **options)
    single = model.generate(input_ids[1:], **options)
    with patch_model(model):
        assert torch.equal(model.generate(input_ids, attention_mask=mask, **options), expected)
        assert torch.equal(model.generate(input_ids[1:], **options), single)


@pytest.mark.usefixtures("in_float64")
def test_a_filled_cache_continues_the_rows():
    model, rows = make_model("mistral"), torch.stack(make_documents([9, 9]))
    with patch_model(model), torch.no_grad():
        expected = model(rows).logits[:, 6:]
        cache = model(rows[:, :6], use_cache=True).past_key_values
        assert_equal_in_float64(model(rows[:, 6:], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.usefixtures("in_float64")
def test_a_mask_may_go_on_behind_the_keys_of_a_cache(family):
    """A mask's columns count tokens from the start of the row, as in transformers."""
    model = make_model(family)
    input_ids, mask = padded(make_documents([5, 9]), "left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with patch_model(model), torch.no_grad():
        expected = model(input_ids, attention_mask=mask, position_ids=positions).logits
        first = {"attention_mask": mask[:, :2], "position_ids": positions[:, :2]}
        cache = model(input_ids[:, :2], **first, use_cache=True).past_key_values
        rest = {"attention_mask": mask, "position_ids": positions[:, 2:7]}
        found = model(input_ids[:, 2:7], **rest, past_key_values=cache).logits
    real = mask[:, 2:7].bool()
    assert_equal_in_float64(found[real], expected[:, 2:7][real])


def test_a_mask_that_ends_before_the_keys_of_a_cache_is_refused():
    model, rows = make_model("llama"), make_documents([9])[0][None]
    with patch_model(model), torch.no_grad():
        cache = model(rows[:, :4], use_cache=True).past_key_values
        rest = {"attention_mask": torch.ones(1, 5), "position_ids": torch.arange(4, 9)[None]}
        with pytest.raises(ValueError, match=r"must cover the 9 keys, got 5"):
            model(rows[:, 4:], **rest, past_key_values=cache)


def test_the_cache_is_off_in_training_and_for_packs():
    model, documents = make_model("llama"), make_documents()
    rows = make_documents([9])[0][None]
    arguments = PackedBatch.from_documents(documents).model_kwargs() | {"use_cache": None}
    with patch_model(model):
        assert model(rows).past_key_values is not None
        assert model(**arguments).past_key_values is None
        model.train()
        assert model(rows).past_key_values is None
        assert model(rows, use_cache=True).past_key_values is not None
        assert model(**arguments).past_key_values is None
    assert model.config.use_cache


def pack(**changes):
    return PackedBatch.from_documents(make_documents()).model_kwargs() | changes


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (lambda: pack(max_length_q=None), "packed inputs must bring .*, got no max_length_q"),
        (lambda: pack(cu_seq_lens_k=None, max_length_k=None), "got no cu_seq_lens_k, max_length_k"),
        (
            lambda: pack(max_length_q=torch.tensor(11, device="meta")),
            "max_length_q must be a Python int, got a tensor on meta",
        ),
        (
            lambda: pack(input_ids=torch.ones(2, 25, dtype=torch.int64), position_ids=None),
            r"packed inputs must be one row \[1, T\], got 2 rows",
        ),
        (lambda: pack(attention_mask=torch.ones(1, 25)), "must be None for packed inputs"),
        (lambda: pack(use_cache=True), "use_cache must be False for packed inputs"),
        (lambda: pack(output_attentions=True), "output_attentions must be False, got True"),
        (
            lambda: pack(encoder_hidden_states=torch.zeros(1)),
            "encoder_hidden_states must be None, got a tensor",
        ),
        (
            lambda: {"input_ids": pack()["input_ids"], "attention_mask": torch.ones(1, 9)},
            r"attention_mask must have the inputs' shape \[1, 25\], got \[1, 9\]",
        ),
        (
            lambda: {"input_ids": pack()["input_ids"], "attention_mask": torch.ones(1, 1, 25, 25)},
            r"attention_mask must be \[batch, tokens\], got \[1, 1, 25, 25\]",
        ),
        (
            lambda: {
                "input_ids": pack()["input_ids"],
                "position_ids": torch.zeros(3, 1, 25, dtype=torch.int64),
            },
            r"position_ids must be \[batch, tokens\], got \[3, 1, 25\]",
        ),
        (
            lambda: {
                "input_ids": pack()["input_ids"],
                "position_ids": pack()["position_ids"],
                "use_cache": True,
            },
            "position_ids must not restart while a key/value cache is filled",
        ),
        (
            lambda: pack(cu_seq_lens_q=torch.tensor([0, 9], dtype=torch.int32)),
            "cu_seq_lens_q must equal cu_seq_lens_k, got \\[0, 9\\] and",
        ),
    ],
)
def test_contradictions(inputs, message):
    model = make_model("llama")
    with patch_model(model), pytest.raises(ValueError, match=message):
        model(**inputs())


def test_restarting_positions_on_top_of_a_cache_are_refused():
    model, rows = make_model("llama"), make_documents([9])[0][None]
    with patch_model(model), torch.no_grad():
        cache = model(rows[:, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="position_ids must not restart"):
            model(rows[:, 4:], past_key_values=cache, position_ids=torch.tensor([[4, 5, 0, 1, 2]]))


@pytest.mark.parametrize("name", ["Roberta", "Esm"])
@pytest.mark.usefixtures("in_float64")
def test_packs_for_models_that_count_positions_from_padding(name):
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=1,
        mask_token_id=3,
    )
    model, documents = getattr(transformers, f"{name}Model")(config).eval(), make_documents()
    with torch.no_grad():
        expected = separate_outputs(model, documents)
        with patch_model(model):
            if name == "Roberta":
                assert_equal_in_float64(packed_outputs(model, documents), expected)
            else:  # the embeddings average over a row
                with pytest.raises(ValueError, match="positions restart at 0 per document, got"):
                    packed_outputs(model, documents)
                assert outputs(model, input_ids=documents[0][None]).isfinite().all()


@pytest.mark.parametrize("by_name", [False, True], ids=["patched", "by_name"])
@pytest.mark.parametrize("kind", ["rows", "padding", "positions"])
def test_validation_in_inference_mode_leaves_training_alone(by_name, kind):
    """Lightning validates in inference mode first; training must not reuse tensors made there."""
    model, rows = make_model("llama"), torch.stack(make_documents([9, 9]))
    mask = torch.ones_like(rows)
    mask[0, 6:] = 0
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    extra = {"rows": {}, "padding": {"attention_mask": mask}, "positions": {}}[kind]
    if kind == "positions":
        extra = {"position_ids": positions}
    if by_name:
        model.set_attn_implementation("lctrain_flash")
    else:
        patch_model(model)
    with torch.inference_mode():
        expected = outputs(model, input_ids=rows, **extra).clone()
        fresh = {name: tensor.clone() for name, tensor in extra.items()}
        assert torch.equal(outputs(model, input_ids=rows.clone(), **fresh), expected)
    found = outputs(model, input_ids=rows, **extra)
    found.sum().backward()
    assert torch.equal(found, expected)
