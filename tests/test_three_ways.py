"""Tests that Hydra, LongContextModule and a user's module give the same losses, bit for bit."""

import random

import lightning.pytorch as pl
import pytest
import torch

from lctrain.build import build_datamodule, build_model, build_trainer
from lctrain.callbacks import (
    BatchSeed,
    IsolationCheck,
    PatchAttention,
    StepCheckpoint,
    ThroughputMonitor,
    TokenExactLoss,
)
from lctrain.config import TrainConfig, to_dataclass
from lctrain.loss import causal_lm_loss
from lctrain.module import LongContextModule
from lctrain.optim import build_optimizer, build_scheduler, follow_schedule
from lctrain.train import train
from tests.configs.composed import composed

STEPS, KILLED_AT, WINDOW = 30, 17, 2
WORDS = ("def", "return", "class", "self", "None", "for", "in", "while", "yield", "lambda")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class KilledError(Exception):
    """An error that stands for the death of the process."""


class Killed(pl.Callback):
    """A callback that records every step's loss, and ends the run inside an accumulation window."""

    def __init__(self, losses, dies):
        self.losses, self.dies = losses, dies

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        inside = trainer.fit_loop.epoch_loop.total_batch_idx % WINDOW == 1
        if self.dies and trainer.global_step == KILLED_AT and inside:
            raise KilledError

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not trainer.fit_loop._should_accumulate():
            exact = [c for c in trainer.callbacks if isinstance(c, TokenExactLoss)]
            self.losses[trainer.global_step] = float((exact or [pl_module])[0].last_loss)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Returns a function that makes the Hydra run's config for a folder."""
    corpus, cache = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("cache")
    numbers = random.Random(0)
    for i in range(30):
        words = numbers.choices(WORDS, k=numbers.randrange(20, 200))
        (corpus / f"{i}.txt").write_text(f"{i} " + " ".join(words))
    overrides = [
        "data=text",
        f"data.files=[{corpus}/*.txt]",
        f"data.cache_dir={cache}",
        "data.max_tokens=96",
        "data.vocab_size=300",
        "model=tiny",
        "attention.dropout=0.1",
        "optim.learning_rate=0.01",
        "trainer.accelerator=cpu",
        f"trainer.max_steps={STEPS}",
        f"trainer.accumulate_grad_batches={WINDOW}",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
        "trainer.limit_val_batches=1",
        "callbacks.checkpoint.every_n_steps=5",
        "evaluation.enabled=false",
        "export=false",
    ]

    def make(folder, *more) -> TrainConfig:
        root = f"paths.root={folder}"
        return to_dataclass(composed(root, *overrides, *more, output_dir=folder), TrainConfig)

    return make


class OwnModule(pl.LightningModule):
    """A user's module with a model, a step that returns a summed loss, and an optimizer."""

    def __init__(self, model, optim):
        super().__init__()
        self.language_model, self.optim = model, optim

    def training_step(self, batch, batch_idx):
        loss, tokens = causal_lm_loss(self.language_model, batch)
        return {"loss": loss, "num_tokens": tokens}

    def configure_optimizers(self):
        optimizer = build_optimizer(self.language_model, self.optim)
        scheduler = build_scheduler(optimizer, self.optim, STEPS)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_train_start(self):
        follow_schedule(self.lr_schedulers())


RECORDED: list[dict[int, float]] = []  # a config holds plain values only


def watch(dies):
    """Records the objects that are built from the Hydra run's config."""
    return Killed(RECORDED[-1], dies)


def run_hydra(config, folder, losses, dies, resume):
    """Runs `lctrain-train` with an additional callback that records losses."""
    more = ["ckpt_path=last"] if resume else []
    made = config(folder, *more)
    RECORDED.append(losses)
    watch = {"_target_": "tests.test_three_ways.watch", "dies": dies}
    callbacks = dict(made.callbacks) | {"watch": watch}
    train(TrainConfig(**{**vars(made), "callbacks": callbacks}))


def run_by_hand(config, folder, losses, dies, resume, make_module, callbacks):
    made = config(folder)
    data = build_datamodule(made.data)
    data.prepare_data()
    data.setup()
    torch.manual_seed(made.seed)
    model = build_model(made.model, data.vocab_size)
    checkpoint = StepCheckpoint(folder / "checkpoints", every_n_steps=5)
    trainer = build_trainer(
        made.trainer, [*callbacks, checkpoint, Killed(losses, dies)], [], str(folder)
    )
    path = checkpoint.last_path if resume else None
    trainer.fit(make_module(model, made), data, ckpt_path=path, weights_only=False)


def by_hand(config, folder, losses, dies, resume):
    def make(model, made):
        return LongContextModule(model, made.optim, made.attention, seed=made.seed)

    run_by_hand(config, folder, losses, dies, resume, make, [])


def own_module(config, folder, losses, dies, resume):
    def make(model, made):
        return OwnModule(model, made.optim)

    callbacks = [
        ThroughputMonitor(),
        TokenExactLoss(),
        IsolationCheck(),
        BatchSeed(0),
        PatchAttention("flash", dropout=0.1),
    ]
    run_by_hand(config, folder, losses, dies, resume, make, callbacks)


WAYS = {"hydra": run_hydra, "by-hand": by_hand, "own-module": own_module}


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    """Losses of an uninterrupted run with LongContextModule in Python."""
    losses: dict[int, float] = {}
    by_hand(config, tmp_path_factory.mktemp("whole"), losses, dies=False, resume=False)
    return losses


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_bit_equal_through_a_kill(config, uninterrupted, tmp_path, way):
    before: dict[int, float] = {}
    after: dict[int, float] = {}
    with pytest.raises(KilledError):
        WAYS[way](config, tmp_path, before, dies=True, resume=False)
    WAYS[way](config, tmp_path, after, dies=False, resume=True)
    assert list(before) == list(range(1, KILLED_AT + 1))
    assert list(after) == list(range(16, STEPS + 1))  # from the checkpoint of step 15 on
    assert len(set(uninterrupted.values())) == STEPS
    assert before | after == uninterrupted
    assert before.keys() & after.keys() == {16, 17}
