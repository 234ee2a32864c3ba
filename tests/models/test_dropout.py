"""Tests dropout in a patched model: only in training, set by the seed, equal in recomputation."""

import pytest
import torch

from lctrain.batch import PackedBatch
from lctrain.models import patch_model
from tests.models.families import FAMILIES, make_documents, make_model, packed_outputs


def seeded(model, documents, seed=5, **inputs):
    torch.manual_seed(seed)
    return packed_outputs(model, documents, **inputs).detach()


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_training_only_and_a_function_of_the_seed(family):
    model, documents = make_model(family), make_documents()
    with patch_model(model, dropout=0.3):
        plain = seeded(model, documents)
        assert torch.equal(plain, seeded(model, documents, seed=6))
        model.train()
        dropped = seeded(model, documents)
        assert not torch.equal(dropped, plain)
        assert torch.equal(dropped, seeded(model, documents))
        assert not torch.equal(dropped, seeded(model, documents, seed=6))


def test_the_default_is_the_config_s_and_the_option_wins():
    documents = make_documents()
    model = make_model("llama", attention_dropout=0.3).train()
    with patch_model(model):
        from_config = seeded(model, documents)
    with patch_model(model, dropout=0.0):
        off = seeded(model, documents)
    with patch_model(make_model("llama").train(), dropout=0.3) as handle:
        assert torch.equal(seeded(handle.model, documents), from_config)
    with patch_model(make_model("llama").train()) as handle:
        assert torch.equal(seeded(handle.model, documents), off)
    assert not torch.equal(from_config, off)


def test_layers_and_heads_draw_their_own_masks(monkeypatch):
    """All keys and queries are equal, so heads and layers differ only by their dropout masks."""
    from lctrain_kernels.varlen import api

    attend, outs = api.flash_attn_pack_func, []

    def record(q, k, v, *args, **kwargs):
        equal = torch.ones_like(q), torch.ones_like(k), torch.ones_like(v).cumsum(0)
        out, lse = attend(*equal, *args, **kwargs)
        outs.append(out)
        return out, lse

    monkeypatch.setattr(api, "flash_attn_pack_func", record)
    model = make_model("llama").train()
    with patch_model(model, dropout=0.3):
        packed_outputs(model, make_documents([20]))
    heads = [out[:, head, 0] for out in outs for head in range(out.shape[1])]
    assert len(heads) == 8
    for i, head in enumerate(heads):
        assert not any(torch.equal(head, other) for other in heads[:i])


def test_document_ids_key_the_mask_wherever_the_document_lies():
    model = make_model("llama", num_hidden_layers=1).train()
    documents = make_documents([6, 11, 7])
    first = PackedBatch.from_documents(documents, document_ids=[4, 9, 2]).model_kwargs()
    second = PackedBatch.from_documents(documents[::-1], document_ids=[2, 9, 4]).model_kwargs()
    other = PackedBatch.from_documents(documents, document_ids=[4, 8, 2]).model_kwargs()
    results = []
    with patch_model(model, dropout=0.3):
        for arguments in (first, second, other):
            torch.manual_seed(5)
            results.append(model(**arguments).logits[0].detach())
    middle = (slice(6, 17), slice(7, 18), slice(6, 17))
    same, moved, rekeyed = (result[rows] for result, rows in zip(results, middle, strict=True))
    assert torch.equal(same, moved)
    assert not torch.equal(same, rekeyed)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "modernbert"])
def test_checkpointing_replays_the_masks(family, use_reentrant):
    model = make_model(family).train()
    if family == "bert":
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    expected = _step(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = _step(model)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def _step(model):
    documents = make_documents()
    model.zero_grad()
    with patch_model(model, dropout=0.3):
        torch.manual_seed(5)
        first = packed_outputs(model, documents)
        second = packed_outputs(model, make_documents([4, 9], seed=3))  # before the first backward
        (first.square().sum() + second.sum()).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return grads | {"first": first.detach(), "second": second.detach()}
