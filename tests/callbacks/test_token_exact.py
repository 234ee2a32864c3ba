"""Tests TokenExactLoss: a user's module gets bit for bit the gradients of LongContextModule."""

import pytest
import torch

from lctrain.callbacks import TokenExactLoss
from lctrain.config import OptimConfig
from lctrain.module import LongContextModule
from tests.callbacks.own_module import OwnModule
from tests.forked import run_forked
from tests.numerics import as_float32, assert_equal_in_float64, assert_far_apart, near
from tests.test_module import RecordingModule
from tests.training import loader, make_batch, make_trainer

UNEVEN = [make_batch([5, 9], 0), make_batch([40], 1), make_batch([2, 3, 4], 2)]
MORE = [make_batch([17, 30], 3), make_batch([6], 4)]
SETTINGS = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}


class Sums(OwnModule):
    """A module that returns the summed loss and a count, and records gradients before each step."""

    def __init__(self, model):
        super().__init__(model, learning_rate=0.5)
        self.gradients = []

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append([p.grad.clone() for p in self.parameters()])


class Counted(Sums):
    """A module that returns the summed loss alone; the batch holds the count."""

    def loss_of(self, batch):
        return super().loss_of(batch)["loss"]


class Means(Sums):
    """A module that returns the mean loss of a micro-batch, as transformers' models do."""

    def loss_of(self, batch):
        output = super().loss_of(batch)
        return {"loss": output["loss"] / output["num_tokens"], "tokens": batch.num_valid_tokens}


class Manual(Sums):
    """A module that accumulates three micro-batches by hand; the epoch's last window is shorter."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss_of(batch)["loss"])
        if batch_idx in (2, 4):
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


def fit(tmp_path, module, *callbacks, batches=(*UNEVEN, *MORE), **settings):
    make_trainer(tmp_path, callbacks, **(SETTINGS | settings)).fit(module, loader(batches))
    return module


@pytest.fixture
def reference(tmp_path, make_llama):
    """Returns LongContextModule, trained on the same unpatched model and data."""
    module = RecordingModule(make_llama(), OptimConfig(), attention=None)
    return fit(tmp_path, module)


@pytest.mark.parametrize("kind", [Sums, Counted])
def test_gradients_are_bit_equal(tmp_path, make_llama, reference, kind):
    exact = TokenExactLoss()
    module = fit(tmp_path, kind(make_llama()), exact)
    assert len(module.gradients) == 2  # the second window is incomplete
    for mine, theirs in zip(module.gradients, reference.seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert float(exact.last_loss) == reference.losses[-1]
    for mine, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs)  # clipped by the same norm


@pytest.mark.usefixtures("in_float64")
def test_without_it_tokens_of_short_batches_weigh_more(tmp_path, make_llama, reference):
    module = fit(tmp_path, Means(make_llama()))
    assert_far_apart(module.gradients[0][0], reference.seen[0][0])


@pytest.mark.usefixtures("in_float64")
def test_means_are_weighed_by_their_tokens(tmp_path, make_llama, reference):
    exact = TokenExactLoss("mean", tokens="tokens")
    module = fit(tmp_path, Means(make_llama()), exact)
    assert_equal_in_float64(module.gradients, reference.seen)
    assert float(exact.last_loss) == near(reference.losses[-1])


@pytest.mark.usefixtures("in_float64")
def test_manual_optimization(tmp_path, make_llama, reference):
    off = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
    module = fit(tmp_path, Manual(make_llama()), TokenExactLoss(), **off)
    assert_equal_in_float64(module.gradients[0], reference.seen[0])


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_loss_in_parts_counts_its_tokens_once(tmp_path, make_llama, reference, reduction):
    class Parts(Sums):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            output = self.loss_of(batch)
            loss = output["loss"]
            if reduction == "mean":
                loss = loss / output["num_tokens"]
            self.manual_backward(0.25 * loss, retain_graph=True)
            self.manual_backward(0.75 * loss)
            if batch_idx == 2:
                self.optimizers().step()

    off = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
    exact = TokenExactLoss(reduction)
    module = fit(tmp_path, Parts(make_llama()), exact, batches=UNEVEN, **off)
    assert_equal_in_float64(module.gradients[0], reference.seen[0])
    assert float(exact.last_loss) == near(reference.losses[0])


@pytest.mark.usefixtures("in_float64")
def test_two_steps_in_a_batch_count_its_tokens_twice(tmp_path, make_llama):
    class Twice(Sums):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(2):
                self.zero_grad()
                self.manual_backward(self.loss_of(batch)["loss"])
                self.optimizers().step()

    off = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
    twice = fit(tmp_path, Twice(make_llama()), TokenExactLoss(), batches=UNEVEN[:1], **off)
    batches = [UNEVEN[0], UNEVEN[0]]
    once = fit(tmp_path, Sums(make_llama()), TokenExactLoss(), batches=batches, **off)
    assert_equal_in_float64(twice.gradients, once.gradients)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("kind", [int, torch.tensor], ids=["int", "tensor"])
def test_a_micro_batch_without_valid_labels_adds_nothing(tmp_path, make_llama, kind):
    class Empty(Means):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:  # what transformers' mean over no token is
                nothing = sum((p * 0).sum() for p in self.parameters())
                return {"loss": nothing + float("nan"), "tokens": kind(0)}
            output = super().training_step(batch, batch_idx)
            return output | {"tokens": kind(int(output["tokens"]))}

    exact, without = (TokenExactLoss("mean", tokens="tokens") for _ in range(2))
    off = {"accumulate_grad_batches": 2, "gradient_clip_val": None}
    module = fit(tmp_path, Empty(make_llama()), exact, batches=UNEVEN[:2], **off)
    off["accumulate_grad_batches"] = 1
    alone = fit(tmp_path, Means(make_llama()), without, batches=UNEVEN[:1], **off)
    assert float(exact.last_loss) == near(float(without.last_loss))
    assert_equal_in_float64(module.gradients[0], alone.gradients[0])


@pytest.mark.usefixtures("in_float64")
def test_a_skipped_micro_batch_does_not_spoil_the_window(tmp_path, make_llama):
    class Skips(Sums):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    skipped = fit(tmp_path, Skips(make_llama()), TokenExactLoss(), batches=UNEVEN)
    whole = fit(
        tmp_path,
        Sums(make_llama()),
        TokenExactLoss(),
        batches=UNEVEN[:2],
        accumulate_grad_batches=2,
    )
    assert_equal_in_float64(skipped.gradients[0], whole.gradients[0])


def test_the_loss_per_token_is_logged(tmp_path, make_llama):
    exact = TokenExactLoss()
    trainer = make_trainer(tmp_path, [exact], **SETTINGS)
    trainer.fit(Sums(make_llama()), loader(UNEVEN))
    assert float(trainer.callback_metrics["train/loss"]) == as_float32(float(exact.last_loss))


def test_a_count_function(tmp_path, make_llama, reference):
    class NoCount(Sums):
        def loss_of(self, batch):
            return super().loss_of(batch)["loss"]

    count = TokenExactLoss(count_tokens=lambda batch: batch.num_valid_tokens)
    module = fit(tmp_path, NoCount(make_llama()), count)
    assert torch.equal(module.gradients[0][0], reference.seen[0][0])


def test_methods_come_back_also_after_a_failure(tmp_path, make_llama):
    class Breaks(Sums):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    exact = TokenExactLoss()
    module = Breaks(make_llama())
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, module, exact)
    assert not {"training_step", "backward"} & set(vars(module))
    again = fit(tmp_path, Sums(make_llama()), exact)  # the open window is forgotten
    fresh = fit(tmp_path, Sums(make_llama()), TokenExactLoss())
    assert torch.equal(again.gradients[0][0], fresh.gradients[0][0])
    assert not {"training_step", "backward"} & set(vars(again))


class TwoOptimizers(Manual):
    def configure_optimizers(self):
        halves = list(self.parameters())
        return [torch.optim.SGD([p], lr=0.1) for p in halves[:2]]


@pytest.mark.parametrize(
    ("make", "callbacks", "message"),
    [
        (Sums, lambda: [TokenExactLoss(), TokenExactLoss()], "must hold one TokenExactLoss, got 2"),
        (
            lambda model: LongContextModule(model, OptimConfig()),
            lambda: [TokenExactLoss()],
            "LongContextModule, which divides by the tokens of the window itself. Remove",
        ),
        (TwoOptimizers, lambda: [TokenExactLoss()], "needs one optimizer, got 2"),
        (
            Sums,
            lambda: [TokenExactLoss(count_tokens=lambda batch: "many")],
            "num_tokens must be a number of tokens",
        ),
    ],
    ids=["twice", "own", "two-optimizers", "no-number"],
)
def test_errors(tmp_path, make_llama, make, callbacks, message):
    if make is Sums and "number" in message:
        make = Counted
    trainer = make_trainer(tmp_path, callbacks())
    with pytest.raises(ValueError, match=message):
        trainer.fit(make(make_llama()), loader(UNEVEN))


def test_a_batch_without_a_count(tmp_path, make_llama):
    class Foreign(Sums):
        def loss_of(self, batch):
            return self.model(batch).logits.sum()

    batches = torch.utils.data.DataLoader([torch.ones(1, 4).long()], batch_size=None)
    with pytest.raises(ValueError, match="batch must be a PackedBatch"):
        make_trainer(tmp_path, [TokenExactLoss()]).fit(Foreign(make_llama()), batches)


def test_a_loss_that_is_no_number(tmp_path, make_llama):
    class Vector(Sums):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            return output | {"loss": output["loss"].expand(2)}

    with pytest.raises(ValueError, match="a loss of one number, got shape"):
        fit(tmp_path, Vector(make_llama()), TokenExactLoss())


def test_wrong_settings(tmp_path, make_llama):
    with pytest.raises(ValueError, match="reduction must be one of sum, mean, got 'none'"):
        TokenExactLoss("none")
    trainer = make_trainer(tmp_path, [TokenExactLoss()])
    trainer.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(ValueError, match="precision must be 32-true"):
        trainer.fit(Sums(make_llama()), loader(UNEVEN))


def test_a_sharding_strategy_is_refused(make_llama):
    from types import SimpleNamespace

    from lctrain.callbacks.token_exact import _refuse_trainer

    with pytest.raises(ValueError, match="strategy must be a single device or ddp"):
        _refuse_trainer(SimpleNamespace(precision="32-true", strategy=object()))


def test_two_ranks_equal_the_module(tmp_path):
    """Two gloo ranks with unequal packs, accumulation and clipping equal LongContextModule."""
    run_forked("tests.callbacks.train_two_ranks", str(tmp_path), env={"NODE_RANK": "0"})
    module, callback = (torch.load(tmp_path / f"{name}.pt") for name in ("module", "callback"))
    assert [loss for loss, _ in module["records"]] == [loss for (loss,) in callback["records"]]
    for name, weight in module["weights"].items():
        assert torch.equal(callback["weights"][name], weight)
