"""Tests on a GPU that a training step never waits for the device."""

import lightning.pytorch as pl
import pytest
import torch

from lctrain.config import AttentionConfig, OptimConfig
from lctrain.module import LongContextModule
from tests.training import loader, make_batch, make_trainer

PACKS = [[130, 70], [200]]  # lengths: one window of two packs


class NoSynchronisation(pl.Callback):
    """Makes each synchronisation an error, after a given number of optimizer steps.

    Checked are the forward and backward passes of all micro-batches, the end of the accumulation
    window, clipping and the optimizer. Fetching and copying batches and logging are not checked.
    """

    def __init__(self, after_steps: int) -> None:
        self.after_steps = after_steps
        self.watched = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step >= self.after_steps:
            self.watched += 1
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer, pl_module, exception) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_whole_step_does_not_synchronise(tmp_path, make_llama, precision, dropout):
    """Two windows warm up: kernels compile, the head is verified, the optimizer gets state."""
    windows = 4
    packs = [make_batch(lengths, i).to("cuda") for i, lengths in enumerate(PACKS)] * windows
    watch = NoSynchronisation(after_steps=2)
    module = LongContextModule(
        make_llama(head_dim=64), OptimConfig(), attention=AttentionConfig(dropout=dropout)
    )
    trainer = make_trainer(
        tmp_path,
        [watch],
        accelerator="gpu",
        precision=precision,
        accumulate_grad_batches=len(PACKS),
        gradient_clip_val=0.01,
        log_every_n_steps=100,
    )
    trainer.fit(module, loader(packs))
    assert watch.watched == len(PACKS) * (windows - 2)
    assert trainer.global_step == windows
    assert float(module.gradient_norm) > 0.01
    assert torch.isfinite(module.last_loss)
