"""Runs the recipe: `python -m lctrain.recipes.passkey_model`. The README beside it describes it."""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lctrain.data.passkey import PasskeyFormat
from lctrain.data.sources import StdlibSource
from lctrain.eval import Extension, passkey_retrieval
from lctrain.recipes.output import messages
from lctrain.recipes.passkey_model.network import build_network
from lctrain.recipes.passkey_model.tokenizer import train_tokenizer
from lctrain.recipes.passkey_model.training import Material, train_network
from lctrain.warn import begin_warnings
from lctrain_kernels.strict_json import write_json

WINDOW = 128
SEED = 0
TEXT_BYTES = 2_000_000
HELD_OUT = 10  # every tenth file is held out
RATIOS = (1, 2, 4, 8, 16, 32)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
METHODS = ("plain", "dual_chunk")


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains the model, stores it, and measures how many passkeys it finds."""
    begin_warnings()
    parser = argparse.ArgumentParser(
        prog="python -m lctrain.recipes.passkey_model",
        description="Trains the small model in lctrain's wheel that finds passkeys.",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/passkey_model"))
    parser.add_argument("--keys", type=int, default=10, help="keys for each length and depth")
    parser.add_argument("--seed", type=int, default=SEED)
    chosen = parser.parse_args(arguments)
    if (chosen.output / "train.json").exists():
        raise ValueError(
            f"--output must be a folder in which the recipe has not run, got {chosen.output}. "
            "Choose another folder, or delete this one."
        )
    torch.manual_seed(chosen.seed)
    torch.set_num_threads(1)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as cache:
        texts = list(StdlibSource(max_bytes=TEXT_BYTES).load(Path(cache))["text"])
    held_out = texts[::HELD_OUT]
    training = [text for index, text in enumerate(texts) if index % HELD_OUT]
    tokenizer = train_tokenizer(training)
    format = PasskeyFormat.of(tokenizer)
    documents, unseen = (
        [np.array(ids) for ids in tokenizer(part, verbose=False)["input_ids"] if ids]
        for part in (training, held_out)
    )
    model = build_network(len(tokenizer), WINDOW)
    material = Material(format, documents, chosen.seed)
    steps = train_network(model, material, WINDOW)
    model.half().save_pretrained(chosen.output / "model")
    tokenizer.save_pretrained(chosen.output / "model")
    seconds = time.process_time() - started
    record = {
        "steps": steps,
        "cpu_seconds": round(seconds, 1),
        "parameters": model.num_parameters(),
        "window": WINDOW,
        "vocabulary": len(tokenizer),
        "key_words": len(format.words),
        "seed": chosen.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    write_json(chosen.output / "train.json", record)
    table = passkey_retrieval(
        model.float(),
        format,
        unseen,
        [ratio * WINDOW for ratio in RATIOS],
        [Extension(method, WINDOW) for method in METHODS],
        max_tokens=RATIOS[-1] * WINDOW,
        depths=DEPTHS,
        keys_per_cell=chosen.keys,
        name="passkey model",
    )
    table.save(chosen.output)
    print(table)


if __name__ == "__main__":
    with messages("python -m lctrain.recipes.passkey_model"):
        main()
