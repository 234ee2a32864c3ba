"""Tests batches without a label: a mean loss is NaN, as in transformers, and gradients are 0."""

import lightning.pytorch as pl
import pytest
import torch
from transformers.models.auto import modeling_auto

from lctrain import patch_model
from lctrain.batch import IGNORE_INDEX
from lctrain.distributed import Topology
from lctrain.loss.held_out import HeldOutLoss
from lctrain.loss.token_window import TokenWindow
from tests.loss.conftest import build_architecture
from tests.models.tiny import tiny_config, tiny_model


def models(kind):
    if kind == "causal":
        return build_architecture("llama")
    auto = getattr(modeling_auto, f"AutoModelFor{kind}")
    return tiny_model("bert", auto._model_mapping[type(tiny_config("bert"))])


def labels_of(kind):
    ids = torch.arange(12).view(2, 6) + 3
    return ids, torch.full_like(ids, IGNORE_INDEX)


@pytest.mark.parametrize("kind", ["causal", "MaskedLM"])
def test_fused_losses(kind):
    model = models(kind).train()
    ids, labels = labels_of(kind)
    assert model(input_ids=ids, labels=labels).loss.isnan()
    with patch_model(model, loss=True):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
    assert loss.isnan()
    assert any(p.grad is not None for p in model.parameters())
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("divisor", [0, torch.tensor(0)], ids=["int", "tensor"])
def test_no_item_in_all_micro_batches(divisor):
    model = models("causal").train()
    ids, labels = labels_of("causal")
    with patch_model(model, loss=True):
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=divisor).loss
        loss.backward()
        part = model(input_ids=ids, labels=labels, num_items_in_batch=divisor + 3).loss
    assert loss.isnan()
    assert part == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["TokenClassification", "SequenceClassification"])
def test_heads_that_compute_their_own_loss(kind):
    """Attention is all that is swapped, so the loss is the NaN of transformers."""
    model = models(kind).train()
    ids, labels = labels_of(kind)
    labels = labels[:, 0] if kind == "SequenceClassification" else labels
    with patch_model(model):
        assert model(input_ids=ids, labels=labels).loss.isnan()


def test_window_of_an_optimizer_step():
    """Losses that are a sum and a count, as those of DPO and GRPO, are divided here."""
    parameter = torch.ones(3, requires_grad=True)
    (parameter.sum() * 0).backward()
    window = TokenWindow()
    window.add(torch.tensor(0.0), torch.tensor(0))
    window.close([parameter], 1, Topology.of(pl.Trainer(accelerator="cpu", logger=False)))
    assert window.last_loss.isnan()
    assert torch.equal(parameter.grad, torch.zeros(3))


def test_held_out_sets():
    """A set without a target must not look like a perfect one."""
    losses = HeldOutLoss()
    losses.add(0, torch.tensor(6.0), 3)
    losses.add(1, torch.tensor(0.0), 0)
    ranks = Topology.of(pl.Trainer(accelerator="cpu", logger=False))
    whole, sets = losses.means(ranks, ["text", "empty"])
    assert (whole, sets["text"]) == (2.0, 2.0)
    assert sets["empty"].isnan()
