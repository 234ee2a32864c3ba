"""Trains one model, and measures its held-out loss, largest logit and passkeys."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lctrain.build import build_datamodule
from lctrain.config import PretrainedModelConfig, TrainConfig
from lctrain.data.passkey import PasskeyFormat
from lctrain.eval import Extension, longest_documents, passkey_retrieval
from lctrain.models import patch_model
from lctrain.models.pretrained import load_pretrained
from lctrain.recipes.differential.experiment import Experiment, trained_window, write_json
from lctrain.recipes.differential.key_loss import passkey_loss
from lctrain.recipes.differential.largest_logit import largest_logit
from lctrain.recipes.differential.scale import Scale
from lctrain.recipes.differential.variant import Variant
from lctrain.recipes.machine import machine
from lctrain.train import quiet_lightning, train


class AsItIs(Extension):
    """A method for the evaluation that leaves the model's attention unchanged at every length."""

    @contextmanager
    def patched(self, model: nn.Module) -> Iterator[None]:
        """Leaves the model unchanged; see Extension."""
        yield


def prepare_data(experiment: Experiment) -> None:
    """Tokenizes the data into the cache, from which all runs read the tokens."""
    variant, seed = experiment.runs[0]
    module = build_datamodule(experiment.compose(variant, seed).data)
    module.prepare_data()
    module.setup()
    print(f"training rows: {module.packing_report}\nheld-out rows: {module.held_out_report}")


def train_runs(experiment: Experiment) -> None:
    """Trains the runs of this process, and writes one JSON file per run."""
    quiet_lightning()
    for variant, seed in experiment.shared_runs:
        config = experiment.compose(variant, seed)
        report = train(config)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder = Path(config.paths.output_dir) / "model"
        content = {
            "variant": variant.name,
            "seed": seed,
            **machine(config.trainer.accelerator),
            "steps": report.steps,
            "training_loss": [report.first_loss, report.last_loss],
            "held_out_loss": report.held_out_last,
            "tokens_per_second": report.tokens_per_second,
            "peak_memory_gib": report.peak_memory_gib,
            "packing": report.packing,
            "held_out_packing": report.held_out_packing,
            **measure(variant, folder, config, experiment.scale, device),
        }
        write_json(experiment.record(variant, seed), content)
        if not experiment.keep_models:
            shutil.rmtree(folder)


def measure(
    variant: Variant, folder: Path, config: TrainConfig, scale: Scale, device: torch.device
) -> dict[str, Any]:
    """Loads a trained model, and returns its parameters, largest logit and passkey results."""
    model = load_pretrained(PretrainedModelConfig(name_or_path=str(folder)), "float32")
    datamodule = build_datamodule(config.data)
    datamodule.setup()
    window = trained_window(config)
    held_out = datamodule.held_out_documents()
    longest = longest_documents(held_out, scale.logit_documents)
    texts = [document.input_ids for document in held_out]
    format = PasskeyFormat.of(datamodule.tokenizer)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    with patch_model(model, variant.attention), autocast:  # as in training
        model.to(device)
        logits = largest_logit(model, [document.input_ids[:window] for document in longest], device)
        passkeys = passkey_retrieval(
            model,
            format,
            texts,
            [round(share * window) for share in scale.shares],
            [AsItIs("plain", window)],
            max_tokens=scale.max_tokens,
            depths=scale.depths,
            keys_per_cell=scale.keys_per_cell,
            device=device,
        )
        key_loss = passkey_loss(
            model,
            format,
            texts,
            window,
            scale.depths,
            scale.keys_per_cell,
            max_tokens=scale.max_tokens,
            device=device,
        )
    accuracy = passkeys.accuracy("plain").mean(axis=1).tolist()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "largest_logit": max(logits.values()),
        "largest_logit_by_layer": list(logits.values()),
        "key_loss": key_loss,
        "key_loss_of_guessing": math.log(len(format.words)),
        "passkeys": dict(zip(map(str, passkeys.lengths), accuracy, strict=True)),
    }
