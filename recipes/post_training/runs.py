"""Trains one model per seed, measures held-out passkeys before and after, and writes a record."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lctrain.build import build_model, build_trainer, instantiate_all
from lctrain.callbacks.stop import StopAtSignal
from lctrain.config import TrainConfig
from lctrain.data.passkey import PasskeyFormat
from lctrain.memory import ReferenceModel
from lctrain.models import patch_model
from lctrain.models.adapters import inside_adapters
from lctrain.recipes.machine import machine
from lctrain.recipes.output import remove_stopped
from lctrain.recipes.post_training.experiment import Experiment, read_texts
from lctrain.recipes.post_training.passkeys import QuestionSets, accuracy
from lctrain.run.signals import StopSignals, ends_in_order
from lctrain.train import quiet_lightning


def train_seeds(
    experiment: Experiment,
    stage: str,
    make_module: Callable[..., Any],
    make_batches: Callable[[QuestionSets, Any], Any],
    describe: Callable[[Any], dict[str, Any]],
) -> None:
    """Trains with every seed that has no run yet, and adds its run to the record of the stage.

    Args:
        experiment: The experiment.
        stage: "dpo" or "grpo".
        make_module: Called with (model, TrainConfig, Scale); returns the LightningModule.
        make_batches: Called with (questions, patched model); returns the data set of batches.
        describe: Called with the trained module; returns further entries of the run's record.

    Raises:
        ValueError: as `recorded_runs`.
        SystemExit: with a status above 128, if a signal stopped a run, which is then not recorded.
    """
    quiet_lightning()
    runs, header = recorded_runs(experiment, stage), _header(experiment, stage)
    for seed in experiment.seeds:
        if any(run["seed"] == seed for run in runs):
            print(f"seed {seed}: is in {stage}.json already", flush=True)
            continue
        remove_stopped(experiment.folder(stage, seed))
        with StopSignals() as signals, ends_in_order(signals, None):
            run = _train_seed(
                experiment, stage, seed, make_module, make_batches, describe, StopAtSignal(signals)
            )
        before, after = run["accuracy"]
        print(
            f"seed {seed}: keys found {before:.1%} -> {after:.1%} in {run['seconds']} s", flush=True
        )
        runs = sorted([*runs, run], key=lambda run: run["seed"])
        experiment.save(stage, {**header, "runs": runs})


def recorded_runs(experiment: Experiment, stage: str) -> list[dict[str, Any]]:
    """Returns the runs in the record of a stage that was stopped; none if there is no record.

    Args:
        experiment: The experiment.
        stage: "dpo" or "grpo".

    Raises:
        ValueError: if the record has a run of every seed, or its runs had other settings.
    """
    path = experiment.output / f"{stage}.json"
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    runs: list[dict[str, Any]] = record.get("runs", [])
    if set(experiment.seeds) <= {run["seed"] for run in runs} or not runs:
        raise ValueError(
            f"--output must be a folder in which the stage {stage} has not run, got "
            f"{experiment.output}, which holds {path.name} with these seeds. Choose another "
            "folder, delete this one, or name other seeds or stages."
        )
    for name, value in _header(experiment, stage).items():
        if record.get(name) != value:
            raise ValueError(
                f"--output must be a folder of runs with the same settings, got "
                f"{experiment.output}, whose runs had {name}={record.get(name)} and not {value}. "
                "Choose another folder."
            )
    return runs


def _header(experiment: Experiment, stage: str) -> dict[str, Any]:
    """Returns what all runs in a record have in common; a stage may go on on another day."""
    facts = machine(experiment.compose(stage, experiment.seeds[0]).trainer.accelerator)
    del facts["date"]
    return {
        **facts,
        "length": experiment.scale.length,
        "overrides": list(experiment.overrides),
    }


def _train_seed(
    experiment: Experiment,
    stage: str,
    seed: int,
    make_module: Callable[..., Any],
    make_batches: Callable[[QuestionSets, Any], Any],
    describe: Callable[[Any], dict[str, Any]],
    stop: pl.Callback,
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
    callbacks = [*instantiate_all("callbacks", config.callbacks).values(), stop]
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
        "date": time.strftime("%Y-%m-%d"),
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
