"""Compares the training of V1 (DiffLlama) with one kernel launch and with two attention calls.

Model, seed and rows of tokens are the same. As a yardstick, the two attention calls are also
computed in two ways, by transformers' SDPA and eager attention; their difference shows what
rounding does.
"""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lctrain.build import build_datamodule, build_model
from lctrain.data import PackedDataModule
from lctrain.models import patch_model
from lctrain.recipes.differential.experiment import Experiment, trained_window
from lctrain.recipes.differential.variant import VARIANTS

LEARNING_RATE = 1e-3
ONE_LAUNCH, TWO_CALLS, YARDSTICK = "one launch", "two calls, sdpa", "two calls, eager"


def compare_kernels(experiment: Experiment) -> None:
    """Trains V1 with three attentions from the same weights; writes parity.json and parity.csv.

    On a GPU it trains twice: in float32, and in bfloat16.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = experiment.compose(VARIANTS["v1"], experiment.seeds[0])
    precisions = ["float32", "bfloat16"] if device.type == "cuda" else ["float32"]
    scale = experiment.scale
    datamodule = build_datamodule(config.data)
    datamodule.setup()
    window = trained_window(config)
    batches = equal_rows(datamodule, scale.parity_steps, scale.parity_rows, window)
    torch.manual_seed(config.seed)
    model = build_model(config.model, datamodule.vocab_size)
    curves = {}
    for precision in precisions:
        for name in WAYS:
            copied = copy.deepcopy(model).to(device)
            curves[precision, name] = train_rows(copied, batches, name, precision)
    differences = {
        precision: {
            name: largest_difference(curves[precision, name], curves[precision, TWO_CALLS])
            for name in (ONE_LAUNCH, YARDSTICK)
        }
        for precision in precisions
    }
    experiment.save(
        "parity",
        {
            "steps": scale.parity_steps,
            "rows": scale.parity_rows,
            "row_tokens": window,
            "learning_rate": LEARNING_RATE,
            "largest_difference_to_two_calls_with_sdpa": differences,
            "loss": {
                precision: {n: curve for (p, n), curve in curves.items() if p == precision}
                for precision in precisions
            },
        },
    )
    write_curves(experiment.output / "parity.csv", curves)
    for precision, found in differences.items():
        for name, difference in found.items():
            print(f"{precision}: largest difference of the loss, {name}: {difference:.2e}")


def equal_rows(datamodule: PackedDataModule, steps: int, rows: int, tokens: int) -> list[Tensor]:
    """Cuts training packs into rows of one length, each with the tokens of one document.

    Args:
        datamodule: A data module after `setup`.
        steps: Number of steps.
        rows: Rows per step.
        tokens: Tokens per row.

    Returns:
        [rows, tokens] int64 for each step.

    Raises:
        ValueError: if an epoch has fewer tokens.
    """
    needed = steps * rows * tokens
    packs: list[Tensor] = []
    for batch in datamodule.train_dataloader():
        packs.append(batch.input_ids[0])
        if sum(map(len, packs)) >= needed:
            break
    else:
        raise ValueError(
            f"data must hold {needed:,} training tokens for {steps} steps of {rows} rows of "
            f"{tokens}, got {sum(map(len, packs)):,}. Use more data."
        )
    return list(torch.cat(packs)[:needed].view(steps, rows, tokens))


def train_rows(model: Any, batches: Sequence[Tensor], way: str, precision: str) -> list[float]:
    """Trains a model on rows.

    Args:
        model: An unpatched DiffLlama.
        batches: [rows, tokens] int64 for each step.
        way: Name of the attention, one of WAYS.
        precision: "float32", or "bfloat16" for matrix products under autocast.

    Returns:
        The loss of every step, before its update.
    """
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    with WAYS[way](model):
        for rows in batches:
            rows = rows.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
    return losses


def _one_launch(model: Any) -> AbstractContextManager[Any]:
    # By name: "auto" leaves float32 to PyTorch, and the kernels are what is compared.
    backend = "triton" if model.device.type == "cuda" else "auto"
    return patch_model(model, "differential", backend=backend)


def _sdpa(model: Any) -> AbstractContextManager[Any]:
    model.set_attn_implementation("sdpa")
    return nullcontext()


def _eager(model: Any) -> AbstractContextManager[Any]:
    model.set_attn_implementation("eager")
    return nullcontext()


WAYS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    ONE_LAUNCH: _one_launch,
    TWO_CALLS: _sdpa,
    YARDSTICK: _eager,
}


def largest_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the largest absolute difference of two loss curves."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def write_curves(path: Path, curves: dict[tuple[str, str], list[float]]) -> None:
    """Writes a CSV with a row per step, and a column per precision and attention."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(f"{precision}, {name}" for precision, name in curves)])
        for step, losses in enumerate(zip(*curves.values(), strict=True)):
            writer.writerow([step, *losses])
