"""Tests NonFiniteLossGuard: it stops, keeps the last good checkpoint, and names the documents."""

import itertools

import lightning.pytorch as pl
import pytest
import torch

from lctrain.batch import PackedBatch
from lctrain.callbacks import NonFiniteLossError, NonFiniteLossGuard, StepCheckpoint
from lctrain.config import OptimConfig
from lctrain.module import LongContextModule
from tests.callbacks.own_module import OwnModule
from tests.training import loader, make_batch, make_trainer

PACKS = [make_batch([12, 5], i) for i in range(8)]


class PoisonedModule(LongContextModule):
    """A module whose loss is not finite in one batch."""

    def __init__(self, model, at, value):
        super().__init__(model, OptimConfig())
        self.at, self.value = at, value

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.value if batch_idx == self.at else loss


class PoisonedGradient(LongContextModule):
    """A module with a finite loss and one gradient that is not finite."""

    def backward(self, loss, *args, **kwargs):
        super().backward(loss, *args, **kwargs)
        if self.global_step == 3:
            next(self.parameters()).grad.fill_(float("inf"))


def run(tmp_path, module, every=2, **settings):
    checkpoint = StepCheckpoint(tmp_path / "c", every_n_steps=every)
    trainer = make_trainer(
        tmp_path, [NonFiniteLossGuard(), checkpoint], enable_checkpointing=True, **settings
    )
    trainer.fit(module, loader(PACKS))


def all_finite(path):
    state = torch.load(path, weights_only=False)["state_dict"]
    return all(bool(value.isfinite().all()) for value in state.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("log_every", [1, 50])
def test_stops_and_names_the_documents(tmp_path, make_llama, value, log_every):
    module = PoisonedModule(make_llama(), 4, value)
    with pytest.raises(NonFiniteLossError) as error:
        run(tmp_path, module, log_every_n_steps=log_every)
    message = str(error.value)
    assert "micro-batch 4, documents: document-4-0, document-4-1" in message
    last = tmp_path / "c" / "last.ckpt"
    assert f"last good checkpoint is {last}" in message
    assert last.resolve().name == "step-00000004.ckpt"
    assert all_finite(last)
    assert not list((tmp_path / "c").glob("*.tmp"))


def test_the_step_that_saves_is_looked_at_first(tmp_path, make_llama):
    """The loss is checked before a checkpoint is saved, also between two logging steps."""
    with pytest.raises(NonFiniteLossError, match="micro-batch 3"):
        run(tmp_path, PoisonedModule(make_llama(), 3, float("nan")), log_every_n_steps=50)
    assert [path.name for path in (tmp_path / "c").glob("step-*")] == ["step-00000002.ckpt"]


def test_weights_that_overflow_are_not_saved(tmp_path, make_llama):
    module = PoisonedGradient(make_llama(), OptimConfig())
    with pytest.raises(NonFiniteLossError, match=r"weights became NaN or infinite at step 4"):
        run(tmp_path, module, log_every_n_steps=50)
    last = tmp_path / "c" / "last.ckpt"
    assert last.resolve().name == "step-00000002.ckpt"
    assert all_finite(last)


def test_at_the_end_without_checkpoints(tmp_path, make_llama):
    trainer = make_trainer(tmp_path, [NonFiniteLossGuard()], log_every_n_steps=50)
    with pytest.raises(NonFiniteLossError, match="There is no checkpoint yet"):
        trainer.fit(PoisonedModule(make_llama(), 7, float("nan")), loader(PACKS))


def test_documents_without_names_are_named_by_their_id(tmp_path, make_llama):
    batch = PackedBatch.from_documents([torch.arange(20)] * 12, document_ids=range(100, 112))
    trainer = make_trainer(tmp_path, [NonFiniteLossGuard()])
    with pytest.raises(NonFiniteLossError, match=r"documents: id 100, .*id 107 and 4 more"):
        trainer.fit(PoisonedModule(make_llama(), 0, float("nan")), loader([batch]))


def test_a_good_run_passes(tmp_path, make_llama):
    run(tmp_path, LongContextModule(make_llama(), OptimConfig()))


class OftenPoisoned(LongContextModule):
    """A module with non-finite losses in some micro-batches, and one non-finite gradient."""

    bad: frozenset[int] = frozenset()
    bad_gradient = -1

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx in self.bad else loss

    def backward(self, loss, *args, **kwargs):
        super().backward(loss, *args, **kwargs)
        if self.global_step == self.bad_gradient:
            next(self.parameters()).grad.fill_(float("inf"))


def skipping(tmp_path, make_llama, bad, bad_gradient=-1, max_in_a_row=3, **settings):
    module = OftenPoisoned(make_llama(), OptimConfig(learning_rate=1e-2, schedule="constant"))
    module.bad, module.bad_gradient = frozenset(bad), bad_gradient
    guard = NonFiniteLossGuard(on_batch="skip", max_in_a_row=max_in_a_row)
    states = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            states.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))

    callbacks = [guard, Watch(), StepCheckpoint(tmp_path / "c", every_n_steps=1)]
    trainer = make_trainer(tmp_path, callbacks, enable_checkpointing=True, **settings)
    trainer.fit(module, loader(PACKS))
    return guard, states, trainer


def test_skip_leaves_the_step_out_and_counts(tmp_path, make_llama, caplog):
    """A skipped step changes no weight, not even by momentum or decay; later steps do."""
    guard, states, trainer = skipping(tmp_path, make_llama, bad={2, 3}, bad_gradient=5)
    assert guard.left_out == 3
    moved = [not torch.equal(*pair) for pair in itertools.pairwise(states)]
    assert moved == [True, False, False, True, False, True, True]
    assert all(bool(state.isfinite().all()) for state in states)
    assert float(trainer.callback_metrics["train/left_out_steps"]) == 3
    assert "nan in micro-batch 2, documents: document-2-0, document-2-1" in caplog.text
    assert "a gradient" in caplog.text
    again = NonFiniteLossGuard(on_batch="skip")
    again.load_state_dict(guard.state_dict())
    assert again.left_out == 3


def test_skip_leaves_out_a_whole_window(tmp_path, make_llama):
    guard, states, _ = skipping(tmp_path, make_llama, bad={2}, accumulate_grad_batches=2)
    assert guard.left_out == 1
    assert [not torch.equal(*p) for p in zip(states[1::2], states[3::2], strict=False)] == [
        False,
        True,
        True,
    ]


def test_skip_ends_after_too_many_in_a_row(tmp_path, make_llama):
    with pytest.raises(NonFiniteLossError, match=r"at most 2, got 3; the newest: nan in micro-bat"):
        skipping(tmp_path, make_llama, bad={1, 3, 4, 5, 6}, max_in_a_row=2)
    assert all_finite(tmp_path / "c" / "last.ckpt")


class ManualSteps(OwnModule):
    """A module that takes so many optimizer steps in a batch, some after a loss of NaN."""

    automatic_optimization = False

    def __init__(self, model, steps, bad):
        super().__init__(model)
        self.steps, self.bad = steps, bad

    def training_step(self, batch, batch_idx):
        for number in range(max(self.steps[batch_idx], 1)):
            loss = self.loss_of(batch)["loss"] / 100
            self.manual_backward(loss * float("nan") if (batch_idx, number) in self.bad else loss)
            if self.steps[batch_idx]:
                optimizer = self.optimizers()
                optimizer.step()
                optimizer.zero_grad()
        return {"loss": loss.detach()}


def test_skip_counts_each_step_of_a_batch(tmp_path, make_llama):
    guard = NonFiniteLossGuard(on_batch="skip", max_in_a_row=1)
    module = ManualSteps(make_llama(), [2, 2, 2], bad={(0, 0), (1, 0)})
    make_trainer(tmp_path, [guard]).fit(module, loader(PACKS[:3]))
    assert guard.left_out == 2  # a good step lies between them
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_skip_counts_on_over_batches_without_a_step(tmp_path, make_llama):
    guard = NonFiniteLossGuard(on_batch="skip", max_in_a_row=1)
    module = ManualSteps(make_llama(), [0, 1, 0, 1], bad={(0, 0), (2, 0)})
    with pytest.raises(NonFiniteLossError, match="must be at most 1, got 2"):
        make_trainer(tmp_path, [guard]).fit(module, loader(PACKS[:4]))
    assert guard.left_out == 2


def test_skip_passes_over_a_batch_without_a_loss(tmp_path, make_llama):
    class Sometimes(OwnModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)["loss"] / 100
            return [loss * float("nan"), None, loss * float("nan"), loss][batch_idx]

    guard = NonFiniteLossGuard(on_batch="skip", max_in_a_row=2)
    make_trainer(tmp_path, [guard]).fit(Sometimes(make_llama()), loader(PACKS[:4]))
    assert guard.left_out == 2
    guard = NonFiniteLossGuard(on_batch="skip", max_in_a_row=1)
    with pytest.raises(NonFiniteLossError, match="must be at most 1, got 2"):
        make_trainer(tmp_path, [guard]).fit(Sometimes(make_llama()), loader(PACKS[:4]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"on_batch": "ignore"}, "on_batch must be one of stop, skip, got 'ignore'"),
        ({"max_in_a_row": 0}, "max_in_a_row must be at least 1, got 0"),
    ],
)
def test_settings_of_skip(setting, message):
    with pytest.raises(ValueError, match=message):
        NonFiniteLossGuard(**setting)


class Unchecked(torch.Tensor):
    """Stands for a quantized weight, on which torchao has no `isfinite`."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.isfinite:
            raise NotImplementedError("isfinite")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_frozen_weights_may_be_quantized(tmp_path, make_llama):
    model = make_llama()
    layer = model.model.layers[0].mlp.down_proj
    frozen = layer.weight.detach().as_subclass(Unchecked)
    layer.weight = torch.nn.Parameter(frozen, requires_grad=False)
    module = LongContextModule(model)
    guard = NonFiniteLossGuard()
    guard.on_save_checkpoint(make_trainer(tmp_path), module, {})
    layer.weight.requires_grad_(True)
    with pytest.raises(NotImplementedError, match="isfinite"):
        guard.on_save_checkpoint(make_trainer(tmp_path), module, {})
