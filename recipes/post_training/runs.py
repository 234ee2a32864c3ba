"""Trains one model per seed, measures held-out passkeys before and after, and writes a record."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lctrain.build import build_model, build_trainer, instantiate_all
from lctrain.config import TrainConfig
from lctrain.data.passkey import PasskeyFormat
from lctrain.memory import ReferenceModel
from lctrain.models import patch_model
from lctrain.models.adapters import inside_adapters
from lctrain.recipes.post_training.experiment import Experiment, read_texts
from lctrain.recipes.post_training.passkeys import QuestionSets, accuracy
from lctrain.train import quiet_lightning


def train_seeds(
    experiment: Experiment,
    stage: str,
    make_module: Callable[..., Any],
    make_batches: Callable[[QuestionSets, Any], Any],
    describe: Callable[[Any], dict[str, Any]],
) -> None:
    """Trains with every seed, and writes the record of the stage.

    Args:
        experiment: The experiment.
        stage: "dpo" or "grpo".
        make_module: Called with (model, TrainConfig, Scale); returns the LightningModule.
        make_batches: Called with (questions, patched model); returns the data set of batches.
        describe: Called with the trained module; returns further entries of the run's record.
    """
    quiet_lightning()
    facts = machine(experiment.compose(stage, experiment.seeds[0]))
    runs = []
    for seed in experiment.seeds:
        runs.append(_train_seed(experiment, stage, seed, make_module, make_batches, describe))
        before, after = runs[-1]["accuracy"]
        print(
            f"seed {seed}: keys found {before:.1%} -> {after:.1%} in {runs[-1]['seconds']} s",
            flush=True,
        )
        experiment.save(stage, {**facts, "length": experiment.scale.length, "runs": runs})


def _train_seed(
    experiment: Experiment,
    stage: str,
    seed: int,
    make_module: Callable[..., Any],
    make_batches: Callable[[QuestionSets, Any], Any],
    describe: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
    config, scale = experiment.compose(stage, seed), experiment.scale
    started = time.monotonic()
    pl.seed_everything(seed, verbose=False)
    datamodule, texts, held_out = read_texts(config)
    format = PasskeyFormat.of(datamodule.tokenizer)
    steps = config.trainer.max_steps * config.trainer.accumulate_grad_batches
    questions = QuestionSets(format, texts, scale, seed, steps)
    policy = build_model(config.model, datamodule.vocab_size, config.adapter)
    inner = inside_adapters(policy)
    inner.config.max_position_embeddings = max(scale.length, inner.config.max_position_embeddings)
    module = make_module(policy, config, scale)
    assert config.attention is not None
    module.patch_handle = patch_model(
        inner,
        config.attention.name,
        fused=config.attention.fused,
        **config.attention.options(),
    )
    callbacks = list(instantiate_all("callbacks", config.callbacks).values())
    loggers = list(instantiate_all("logger", config.logger).values())
    folder = experiment.folder(stage, seed)
    trainer = build_trainer(config.trainer, callbacks, loggers, str(folder))
    device = trainer.strategy.root_device
    policy.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        before = accuracy(policy, format, held_out, scale)
        batches = make_batches(questions, policy)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    seconds = time.monotonic() - started
    policy.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        after = accuracy(policy, format, held_out, scale)
    return {
        "seed": seed,
        "steps": trainer.global_step,
        "accuracy": [round(before, 4), round(after, 4)],
        "held_out_keys": scale.keys_per_depth * len(scale.depths),
        "seconds": round(seconds, 1),
        "batches": len(batches),
        **describe(module),
    }


def reference_of(policy: Any, config: TrainConfig) -> ReferenceModel:
    """Returns the reference model of a policy that is not patched yet.

    Args:
        policy: The model before training.
        config: Configuration of the run.
    """
    attention = config.attention
    assert attention is not None
    return ReferenceModel(
        policy, config.memory, attention.name, fused=attention.fused, **attention.options()
    )


def machine(config: TrainConfig) -> dict[str, str]:
    """Returns the device of a run and the versions, for its record.

    Args:
        config: Configuration of the run.
    """
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
