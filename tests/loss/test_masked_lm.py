"""Tests the loss of masked language models: at masked positions only, without their logits."""

import dataclasses

import pytest
import torch
from torch.nn import functional
from transformers.models.auto import modeling_auto

from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.loss import masked_lm_loss, masked_losses
from lctrain.models import patch_model
from tests.models.families import make_documents, make_model, padded
from tests.models.tiny import tiny_config, tiny_model
from tests.numerics import assert_equal_in_float64

FAMILIES = ("bert", "roberta", "modernbert", "distilbert", "electra", "albert", "nomic_bert")
LENGTHS = (6, 1, 11, 7)


def masked_lm(family):
    mapping = modeling_auto.AutoModelForMaskedLM._model_mapping
    return tiny_model(family, mapping[type(tiny_config(family))])


def masked_pack():
    """Returns a pack with about a third of its positions as targets."""
    batch = PackedBatch.from_documents(make_documents(LENGTHS))
    chosen = torch.rand(batch.input_ids.shape, generator=torch.Generator().manual_seed(4)) < 0.3
    labels = batch.input_ids.masked_fill(~chosen, IGNORE_INDEX)
    return dataclasses.replace(batch, labels=labels, num_valid_tokens=int(chosen.sum()))


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def watch(model):
    """Returns a list that gets the shape of every input of the output embedding."""
    shapes = []
    projection = model.get_output_embeddings()
    projection.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("in_float64")
def test_loss_and_gradients_of_a_pack(family):
    model, batch = masked_lm(family), masked_pack()
    with patch_model(model):
        logits = model(**batch.model_kwargs()).logits[0]
        expected = functional.cross_entropy(logits, batch.labels[0], reduction="sum")
        expected.backward()
        reference = gradients(model)
        model.zero_grad()
        found, count = masked_lm_loss(model, batch)
        found.backward()
    assert int(count) == batch.num_valid_tokens
    assert_equal_in_float64(found, expected)
    assert gradients(model).keys() == reference.keys()
    for name, gradient in gradients(model).items():
        assert_equal_in_float64(gradient, reference[name])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.usefixtures("in_float64")
def test_labels_of_padded_rows(family, items):
    model = masked_lm(family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokens, mask = padded(make_documents(LENGTHS), "right")
    chosen = (tokens % 3 == 0) & mask.bool()
    labels = tokens.masked_fill(~chosen, IGNORE_INDEX)
    logits = model(tokens, attention_mask=mask).logits[chosen]
    expected = functional.cross_entropy(logits, tokens[chosen], reduction="sum")
    extra = {} if items is None else {"num_items_in_batch": items}
    call = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    model.eval()
    divides = model(**call).loss.item() != model(**call, **extra).loss.item()
    model.train()
    expected = expected / (items if divides else int(chosen.sum()))
    with patch_model(model, loss=True, dropout=0.0) as handle:
        out = model(input_ids=tokens, attention_mask=mask, labels=labels, **extra)
        assert "masked positions" in repr(handle)
        assert model.eval()(input_ids=tokens, labels=labels).logits.shape[:2] == tokens.shape
    assert out.logits is None
    assert_equal_in_float64(out.loss, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("own_loss", [False, True], ids=["ignore-index", "loss-function"])
@pytest.mark.usefixtures("in_float64")
def test_loss_options_mean_what_they_mean_to_the_model(family, own_loss):
    """BERT computes the cross-entropy itself; ModernBERT calls model.loss_function."""
    model, reads = masked_lm(family), family == "modernbert"
    tokens, mask = padded(make_documents(LENGTHS), "right")
    ignored = int(tokens[0, 0])
    labels = tokens.masked_fill(mask == 0, ignored if reads else IGNORE_INDEX)
    extra = {} if own_loss else {"ignore_index": ignored}
    kept = labels != (ignored if reads and not own_loss else IGNORE_INDEX)
    logits = model(tokens, attention_mask=mask).logits[kept]
    expected = functional.cross_entropy(logits, labels[kept])
    if own_loss:
        model.loss_function = lambda *_, **__: torch.tensor(42.0)
        expected = torch.tensor(42.0) if reads else expected
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with patch_model(model, loss=True, dropout=0.0):
        found = model(input_ids=tokens, attention_mask=mask, labels=labels, **extra).loss
    assert_equal_in_float64(found, expected)


@pytest.mark.filterwarnings("error")
def test_no_logits_and_no_head_of_unmasked_positions():
    model, batch = masked_lm("bert"), masked_pack()
    patch_model(model, loss=True)
    seen = []
    transform = model.cls.predictions.transform.dense
    masked_lm_loss(model, batch)  # verifies the head
    transform.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    masked_lm_loss(model, batch)
    out = model.train()(**batch.model_kwargs(), labels=batch.labels)
    assert out.logits is None
    assert seen == [batch.num_valid_tokens] * 2


def test_batches_without_targets_have_gradients():
    model, batch = masked_lm("modernbert"), masked_pack().without_targets()
    patch_model(model)
    loss, count = masked_lm_loss(model, batch)
    loss.backward()
    assert (loss.item(), int(count)) == (0.0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.usefixtures("in_float64")
def test_a_head_that_cannot_run_alone_computes_logits():
    model, batch = masked_lm("bert"), masked_pack()
    patch_model(model)
    expected, _ = masked_lm_loss(model, batch)
    other = masked_lm("bert")
    patch_model(other)
    shapes = watch(other)  # the hook has to run
    with pytest.warns(UserWarning, match="computes the logits of all tokens, .* has hooks"):
        found, _ = masked_lm_loss(other, batch)
    assert_equal_in_float64(found, expected)
    assert shapes[-1][1] == batch.num_tokens


@pytest.mark.usefixtures("in_float64")
def test_a_hook_that_the_output_embedding_gets_later_runs():
    model, batch = masked_lm("bert").train(), masked_pack()
    patch_model(model, loss=True, dropout=0.0)
    inputs = {**batch.model_kwargs(), "labels": batch.labels}
    assert model(**inputs).logits is None
    hook = model.get_output_embeddings().register_forward_hook(lambda _, args, output: output / 2)
    with pytest.warns(UserWarning, match="computes the logits of all tokens, .* has hooks"):
        found = model(**inputs)
    expected = functional.cross_entropy(found.logits[0], batch.labels[0])
    assert_equal_in_float64(found.loss, expected)
    hook.remove()
    assert model(**inputs).logits is None


def test_a_config_that_asks_for_tuples_gets_them():
    model = masked_lm("bert").train()
    model.config.return_dict = False
    tokens = make_documents()[0][None]
    with patch_model(model, loss=True):
        found = model(input_ids=tokens, labels=tokens)
    assert isinstance(found, tuple)
    assert found[1].shape[:2] == tokens.shape


def test_bad_models():
    batch = masked_pack()
    for family in ("llama", "bert"):
        with pytest.raises(ValueError, match=r"for masked language modeling, got .* task='causal'"):
            masked_lm_loss(make_model(family), batch)
    with pytest.raises(ValueError, match="loss=True needs a causal language model, or a masked"):
        patch_model(make_model("bert"), loss=True)


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
def test_losses_at_chosen_positions():
    model, batch = masked_lm("modernbert"), masked_pack()
    patch_model(model)
    logits = model(**batch.model_kwargs()).logits[0]
    positions = torch.tensor([3, 7, 11])
    targets = batch.input_ids[0, positions]
    found = masked_losses(model, batch.model_kwargs(), positions, targets)
    expected = functional.cross_entropy(logits[positions], targets, reduction="none")
    assert_equal_in_float64(found, expected)
