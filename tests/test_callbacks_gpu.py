"""Tests on a GPU that a user's module with callbacks trains as fast as LongContextModule.

`python -m tests.test_callbacks_gpu` prints both rates and the swaps applied to each model.
"""

import statistics
import tempfile

import lightning.pytorch as pl
import pytest
import torch

from lctrain.callbacks import BatchSeed, PatchAttention, ThroughputMonitor, TokenExactLoss
from lctrain.config import OptimConfig
from lctrain.loss import causal_lm_loss
from lctrain.module import LongContextModule
from lctrain.optim import build_optimizer
from tests.training import loader, make_batch, make_trainer

LENGTHS = [8192, 4096, 2048, 1024, 512, 256, 128, 128]  # 16,384 tokens
STEPS, REPEATS, WINDOW = 24, 5, 2
OPTIM = OptimConfig(schedule="constant", warmup_fraction=0.0)


class OwnModule(pl.LightningModule):
    """A user's module, with the optimizer of LongContextModule."""

    def __init__(self, model):
        super().__init__()
        self.lm = model

    def training_step(self, batch, batch_idx):
        loss, _ = causal_lm_loss(self.lm, batch)
        return {"loss": loss, "num_tokens": batch.num_valid_tokens}

    def configure_optimizers(self):
        return build_optimizer(self.lm, OPTIM)


def make_model():
    """Returns a model of about 100 million parameters with head dim 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32_000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=16_384,
        )
    )


def rate(folder, own: bool) -> tuple[float, str]:
    """Returns tokens/s without padding and without the first interval, and the handle's repr."""
    monitor, patch = ThroughputMonitor(), PatchAttention()
    callbacks = [monitor]
    if own:
        module: pl.LightningModule = OwnModule(make_model())
        callbacks += [patch, TokenExactLoss(), BatchSeed(0)]
    else:
        module = LongContextModule(make_model(), OPTIM)
    told = []

    class Tell(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            with trainer.precision_plugin.forward_context():
                told.append(repr(patch.patches if own else pl_module.patch_handle))

    trainer = make_trainer(
        folder,
        [*callbacks, Tell()],
        accelerator="gpu",
        precision="bf16-mixed",
        max_epochs=-1,
        max_steps=STEPS,
        accumulate_grad_batches=WINDOW,
        gradient_clip_val=1.0,
        log_every_n_steps=STEPS // 4,
    )
    trainer.fit(module, loader([make_batch(LENGTHS, seed) for seed in range(8)]))
    return monitor.steady.tokens_per_second, told[0]


def rates(folder) -> tuple[float, float, str]:
    """Returns median tokens/s of LongContextModule and of the callbacks, over alternating runs."""
    rate(folder, own=False)  # kernels compile
    pairs = [(rate(folder, own=False)[0], rate(folder, own=True)) for _ in range(REPEATS)]
    ours = statistics.median(first for first, _ in pairs)
    callbacks = statistics.median(second for _, (second, _) in pairs)
    return ours, callbacks, pairs[0][1][1]


@pytest.mark.gpu
@pytest.mark.hopper
def test_callbacks_use_the_hopper_kernels_and_cost_nothing(tmp_path):
    ours, callbacks, told = rates(tmp_path)
    assert "hopper" in told
    assert callbacks >= 0.99 * ours


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        ours, callbacks, told = rates(name)
    print(told)
    print(f"LongContextModule {ours:,.0f} tokens/s, callbacks {callbacks:,.0f} tokens/s")
    print(f"ratio {callbacks / ours:.4f}")
