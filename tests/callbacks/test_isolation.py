"""IsolationCheck: passes on patched models, stops on leaks, disturbs nothing."""

import pytest
import torch

from lctrain.batch import PackedBatch
from lctrain.callbacks import IsolationCheck, IsolationError
from lctrain.callbacks.isolation import check_isolation
from lctrain.config import OptimConfig
from lctrain.models import patch_model
from lctrain.module import LongContextModule
from tests.training import loader, make_batch, make_trainer

PACKS = [make_batch([9, 30, 21], 0), make_batch([40, 20], 1)]


def leak(model):
    """Lets every token see its predecessor in the pack, as a convolution or a token shift does."""

    def shift(module, arguments, hidden):
        return hidden + 0.1 * hidden.roll(1, dims=1)

    model.model.embed_tokens.register_forward_hook(shift)
    return model


@pytest.fixture
def patched(make_llama):
    model = make_llama(attention_dropout=0.5)
    patch_model(model)
    return model


@pytest.mark.parametrize("largest", [2**28, 100], ids=["logits", "hidden-states"])
def test_patched_model_passes_and_a_leak_is_stopped(patched, monkeypatch, largest):
    monkeypatch.setattr("lctrain.callbacks.isolation.LARGEST_LOGITS", largest)
    for batch in PACKS:
        check_isolation(patched, batch)
    cause = r"changing document 1 \(document-0-1\).*the first in 2 \(document-0-2\) at token 39"
    with pytest.raises(IsolationError, match=cause):
        check_isolation(leak(patched), PACKS[0])


def test_error_says_what_to_do(patched):
    with pytest.raises(IsolationError, match=r"patch_model\(model\) \(attention=flash\)"):
        check_isolation(leak(patched), PACKS[1])


def test_a_model_that_mixes_packed_documents_is_stopped(make_llama):
    """Without the boundaries, transformers' attention runs over the whole pack."""
    model = make_llama()

    class Unaware(torch.nn.Module):
        config = model.config

        def forward(self, input_ids, **kwargs):
            return model(input_ids=input_ids)

    with pytest.raises(IsolationError, match="documents of a pack mix"):
        check_isolation(Unaware(), PACKS[0])


def test_one_document_is_checked_as_two_halves(patched):
    check_isolation(patched, make_batch([50], 3))
    check_isolation(patched, make_batch([1], 3))
    with pytest.raises(IsolationError, match=r"document-3-0 \(2nd half\)\) at token 25"):
        check_isolation(leak(patched), make_batch([50], 3))


@pytest.mark.parametrize("lengths", [(20, 0, 30), (0, 50), (50, 0), (0, 0, 25, 25)], ids=str)
def test_empty_documents_are_never_the_one_that_changes(patched, lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    batch = PackedBatch.from_packed(torch.arange(50) + 3, ends)
    check_isolation(patched, batch)
    with pytest.raises(IsolationError, match="documents of a pack mix"):
        check_isolation(leak(patched), batch)


def test_a_model_that_ignores_its_input_proves_nothing(patched):
    torch.nn.init.zeros_(patched.model.embed_tokens.weight)
    with pytest.raises(IsolationError, match="did not change its own outputs"):
        check_isolation(patched, PACKS[0])


def test_nothing_is_disturbed(patched):
    model = patched
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    check_isolation(model, PACKS[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_is_the_same_with_and_without(tmp_path, make_llama):
    losses = []
    for callbacks in ([], [IsolationCheck()]):
        module = LongContextModule(make_llama(attention_dropout=0.1), OptimConfig())
        make_trainer(tmp_path, callbacks).fit(module, loader(PACKS))
        losses.append(float(module.last_loss))
    assert losses[0] == losses[1]


def test_the_run_stops_before_its_first_step(tmp_path, make_llama):
    trainer = make_trainer(tmp_path, [IsolationCheck()])
    module = LongContextModule(leak(make_llama()), OptimConfig())
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(IsolationError):
        trainer.fit(module, loader(PACKS))
    assert trainer.global_step == 0
    for old, new in zip(before, module.parameters(), strict=True):
        assert torch.equal(old, new)
