"""Tests TokenProgressBar: it counts steps of the whole run, and never waits for the device."""

import lightning.pytorch as pl
import pytest

from lctrain.callbacks import ThroughputMonitor, TokenProgressBar
from lctrain.callbacks.progress import RunningMean
from lctrain.config import OptimConfig
from lctrain.module import LongContextModule
from tests.training import loader, make_batch, make_trainer

PACKS = [make_batch([12, 5], i) for i in range(6)]


def fit(tmp_path, make_llama, capsys, bar, **settings):
    trainer = make_trainer(
        tmp_path, [ThroughputMonitor(), bar], enable_progress_bar=True, **settings
    )
    module = LongContextModule(make_llama(), OptimConfig())
    trainer.fit(module, loader(PACKS), loader(PACKS[:2]))
    return capsys.readouterr().err


def test_shows_steps_loss_and_speed(tmp_path, make_llama, capsys):
    text = fit(tmp_path, make_llama, capsys, TokenProgressBar(), accumulate_grad_batches=2)
    assert "training: 100%" in text
    assert "3/3" in text
    assert "loss " in text
    assert "tokens/s" in text


def test_total_is_that_of_the_run_not_of_the_epoch(tmp_path, make_llama, capsys):
    text = fit(tmp_path, make_llama, capsys, TokenProgressBar(), max_epochs=-1, max_steps=9)
    assert "9/9" in text


def test_rate_zero_and_disable_hide_it(tmp_path, make_llama, capsys):
    assert "training" not in fit(tmp_path, make_llama, capsys, TokenProgressBar(refresh_rate=0))
    bar = TokenProgressBar()
    bar.disable()
    assert bar._open("x", 1, 0).disable
    bar.enable()
    assert not bar._open("x", 1, 0).disable


def test_error_closes_the_bar(tmp_path, make_llama, capsys):
    class Failing(LongContextModule):
        def training_step(self, batch, batch_idx):
            raise OSError("broken")

    bar = TokenProgressBar()
    trainer = make_trainer(tmp_path, [bar], enable_progress_bar=True)
    with pytest.raises(OSError, match="broken"):
        trainer.fit(Failing(make_llama(), OptimConfig()), loader(PACKS))
    assert bar._bar.disable


def test_print_goes_above_the_bar(capsys):
    TokenProgressBar().print("a", 1)
    assert capsys.readouterr().out == "a 1\n"


def test_a_resumed_step_is_averaged_once_it_is_complete(tmp_path, make_llama):
    class Losses(RunningMean):
        def __init__(self):
            super().__init__()
            self.added = []

        def add(self, value):
            self.added.append(value)
            super().add(value)

    path = tmp_path / "middle.ckpt"

    class SaveWithinAStep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:  # step 1 has three batches, and step 2 has begun
                trainer.save_checkpoint(path)

    first = make_trainer(tmp_path, [SaveWithinAStep()], accumulate_grad_batches=3)
    first.fit(LongContextModule(make_llama(), OptimConfig()), loader(PACKS))
    bar = TokenProgressBar()
    bar._average = losses = Losses()
    trainer = make_trainer(tmp_path, [bar], accumulate_grad_batches=3, enable_progress_bar=True)
    module = LongContextModule(make_llama(), OptimConfig())
    trainer.fit(module, loader(PACKS), ckpt_path=path)
    assert trainer.global_step == 2
    assert len(losses.added) == 1  # step 2, at its end


def test_the_loss_of_the_bar_is_a_running_mean():
    import torch

    from lctrain.callbacks.progress import SMOOTHING_STEPS, RunningMean

    mean = RunningMean()
    mean.add(None)
    assert mean.value is None
    for value in (7.0, 9.0, 8.0):
        mean.add(torch.tensor(value))
    assert float(mean.value) == 8.0
    for _ in range(20 * SMOOTHING_STEPS):
        mean.add(torch.tensor(2.0))
    # A step below half of a rounding unit moves the mean no more.
    assert abs(float(mean.value) - 2.0) <= SMOOTHING_STEPS * torch.finfo(torch.float32).eps
