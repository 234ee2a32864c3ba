"""SFT on the shipped conversations, by lctrain-train; then counts the right held-out answers."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.build import build_datamodule
from lctrain.config import PretrainedModelConfig, TrainConfig
from lctrain.eval.shipped import passkey_folder
from lctrain.loss import evaluation_mode
from lctrain.models import patch_model
from lctrain.models.pretrained import load_pretrained
from lctrain.recipes.machine import machine
from lctrain.recipes.output import remove_stopped
from lctrain.recipes.post_training.experiment import Experiment
from lctrain.train import quiet_lightning, train


def train_sft(experiment: Experiment) -> None:
    """Trains on conversations with the first seed, and writes sft.json."""
    quiet_lightning()
    seed = experiment.seeds[0]
    config = experiment.compose("sft", seed)
    started = time.monotonic()
    remove_stopped(experiment.folder("sft", seed))
    before = right_answers(passkey_folder("shipped"), config)
    report = train(config)
    after = right_answers(str(experiment.folder("sft", seed) / "model"), config)
    print(f"answers right {before['right']} -> {after['right']} of {after['answers']}", flush=True)
    experiment.save(
        "sft",
        {
            **machine(config.trainer.accelerator),
            "steps": report.steps,
            "held_out_loss": [report.held_out_first, report.held_out_last],
            "answers": after["answers"],
            "right": [before["right"], after["right"]],
            "seconds": round(time.monotonic() - started, 1),
        },
    )


def right_answers(folder: str, config: TrainConfig) -> dict[str, int]:
    """Returns how many held-out answers a model gives token by token, and their number.

    Args:
        folder: Folder of the model.
        config: Configuration whose held-out conversations are answered.
    """
    model: Any = load_pretrained(PretrainedModelConfig(name_or_path=folder), "float32")
    datamodule = build_datamodule(config.data, config.model)
    datamodule.prepare_data()
    datamodule.setup()
    patch_model(model)
    counts = [_right_in(model, batch) for batch in datamodule.val_dataloader()]
    right, answers = (sum(column) for column in zip(*counts, strict=True))
    return {"right": right, "answers": answers}


def _right_in(model: nn.Module, batch: PackedBatch) -> tuple[int, int]:
    """Returns the number of right answers in a pack, and of all its answers."""
    with evaluation_mode(model):
        predicted = model(**batch.model_kwargs()).logits[0].argmax(-1)
    labels = batch.labels[0]
    trained = labels != IGNORE_INDEX
    starts = trained & ~torch.cat([trained[:1] & False, trained[:-1]])
    answer = (starts.cumsum(0) - 1)[trained]
    wrong = (predicted != labels)[trained].long()
    errors = torch.zeros(int(starts.sum()), dtype=torch.int64).index_add(0, answer, wrong)
    return int((errors == 0).sum()), len(errors)
