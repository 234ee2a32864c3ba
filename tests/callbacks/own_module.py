"""LightningModules that stand for a user's own, for the tests of the callbacks."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from lctrain.loss import causal_lm_loss


class OwnModule(pl.LightningModule):
    """A user's module: a model, plain SGD, and a training step that returns the summed loss."""

    def __init__(self, model, learning_rate=0.05):
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.seen = []  # losses of the micro-batches
        self.implementations = []

    def loss_of(self, batch):
        loss_sum, tokens = causal_lm_loss(self.model, batch)
        return {"loss": loss_sum, "num_tokens": tokens}

    def training_step(self, batch, batch_idx):
        output = self.loss_of(batch)
        loss = output["loss"] if isinstance(output, dict) else output
        self.seen.append(float(loss.detach()))
        self.implementations.append(implementation(self.model))
        return output

    def validation_step(self, batch, batch_idx):
        self.implementations.append(implementation(self.model))
        self.log("val/own", self.loss_of(batch)["loss"], batch_size=1)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        self.implementations.append(implementation(self.model))
        return self.loss_of(batch)["loss"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def implementation(model):
    """Returns the attention's name in the transformers model inside `model`."""
    from lctrain.models import find_models

    (found,) = find_models(model).values()
    return found.config._attn_implementation
