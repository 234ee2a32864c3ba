"""Interrupts training runs at random moments, and checks that each resumes bit for bit.

    python -m tests.interrupt_runs --rounds 100 --folder out

Each round starts a tiny run, interrupts it at a random moment (SIGKILL, a signal that asks it to
stop, a full disk, a damaged newest checkpoint), and starts it again with ckpt_path=last until it
finishes. Losses, rows of metrics and trained weights must equal an uninterrupted run's, bit by bit.
No temporary file may be left over, and at most `keep` checkpoints. Each round prints one line.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lctrain.train import train
from tests.forked import Forked
from tests.train.runs import config

STEPS = 12
KEEP = 2  # checkpoints
WORDS = ("def", "return", "class", "self", "None", "for", "in", "while", "yield", "lambda")
KINDS = ("kill", "signal", "disk", "damage")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
BETWEEN_S = 0.05  # between two looks at the folder
LONGEST_S = 600


def overrides(base: Path) -> list[str]:
    """Returns the overrides of a run that takes seconds, with validations and two checkpoints."""
    return [
        "data=text",
        f"data.files=[{base}/corpus/*.txt]",
        f"data.cache_dir={base}/cache",
        "data.max_tokens=128",
        "data.vocab_size=300",
        "data.held_out_fraction=0.2",
        "model=tiny",
        "attention.dropout=0.2",
        "trainer.accelerator=cpu",
        f"trainer.max_steps={STEPS}",
        "trainer.log_every_n_steps=1",
        "trainer.validate_every_n_steps=3",
        "trainer.limit_val_batches=2",
        "trainer.enable_progress_bar=false",
        "callbacks.checkpoint.every_n_steps=2",
        f"callbacks.checkpoint.keep={KEEP}",
        "evaluation.enabled=false",
        "export=false",
    ]


def write_corpus(base: Path) -> None:
    """Writes thirty small files of words."""
    (base / "corpus").mkdir(parents=True)
    numbers = random.Random(0)
    for i in range(30):
        words = numbers.choices(WORDS, k=numbers.randrange(20, 400))
        (base / "corpus" / f"{i}.txt").write_text(f"{i} " + " ".join(words))


def errors_of(folder: Path) -> Path:
    """Returns the file of what the interrupted run of a folder writes to stderr."""
    return folder.with_suffix(".txt")


def start(base: Path, folder: Path, file_limit: int | None = None) -> Forked:
    """Starts the run in a process. A limit of bytes per file simulates a full disk."""
    arguments = [*overrides(base), f"hydra.run.dir={folder}"]
    with errors_of(folder).open("w") as errors, open(os.devnull, "w") as output:
        return Forked(
            *("lctrain.train", *arguments), stdout=output, stderr=errors, file_limit=file_limit
        )


def finish(base: Path, folder: Path, *more: str) -> None:
    """Runs the training to its end in this process, which has imported torch."""
    train(config(*overrides(base), *more, output_dir=folder))


def rows(folder: Path) -> list[tuple[str, str, str, str]]:
    """Returns step, losses and learning rate for every row of metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            (row["step"], row["train/loss"], row["val/loss"], row["train/learning_rate"])
            for row in csv.DictReader(file)
        ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of the newest checkpoint."""
    path = folder / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


def wait_for_step(process: Forked, folder: Path, step: int) -> None:
    """Waits until the step is logged or the process ends."""
    before = time.monotonic()
    while process.poll() is None and time.monotonic() - before < LONGEST_S:
        try:
            if any(int(row[0]) >= step and row[1] for row in rows(folder)):
                return
        except (OSError, ValueError, KeyError):
            pass  # not there yet, or half a row
        time.sleep(BETWEEN_S)


def interrupt(kind: str, base: Path, folder: Path, numbers: random.Random) -> str:
    """Starts a run and interrupts it.

    Returns:
        Description of the interruption.

    Raises:
        AssertionError: if the run does not end as the interruption demands.
    """
    if kind == "disk":
        status = start(base, folder, file_limit=100_000).wait(LONGEST_S)
        errors = errors_of(folder).read_text()
        assert status == 2, errors
        assert "could not be written" in errors, errors
        assert "File too large" in errors, errors
        assert len(errors.strip().splitlines()) <= 10, errors
        return "full disk"
    # A damaged checkpoint needs an older one to go on from.
    step = numbers.randrange(6 if kind == "damage" else 3, STEPS - 1)
    process = start(base, folder)
    wait_for_step(process, folder, step)
    number = numbers.choice(SIGNALS) if kind == "signal" else signal.SIGKILL
    time.sleep(numbers.random() * 0.2)
    process.send_signal(number)
    status = process.wait(LONGEST_S)
    errors = errors_of(folder).read_text()
    name = signal.Signals(number).name
    if kind == "signal":
        if (folder / "report.json").exists():  # it had ended already, with nothing to stop
            assert status in (128 + number, 0, -number), (status, errors)
        else:
            assert status == 128 + number, (status, errors)
            assert f"Stopped by {name}" in errors, errors
        return f"{name} after step {step}"
    if kind == "damage":
        newest = (folder / "checkpoints" / "last.ckpt").resolve()
        damage(newest, numbers)
        return f"SIGKILL after step {step}, {newest.name} damaged"
    return f"SIGKILL after step {step}"


def damage(path: Path, numbers: random.Random) -> None:
    """Damages a file: flips a bit, overwrites a part, cuts it, or empties it."""
    data = bytearray(path.read_bytes())
    place = numbers.randrange(len(data) - 200)
    how = numbers.randrange(4)
    if how == 0:
        data[place] ^= 1 << numbers.randrange(8)
    elif how == 1:
        data[place : place + 64] = bytes(255 - byte for byte in data[place : place + 64])
    elif how == 2:
        del data[place:]
    else:
        data.clear()
    path.write_bytes(data)


def check(folder: Path, whole: Path) -> None:
    """Raises AssertionError unless the run equals the uninterrupted one, without extra files."""
    assert rows(folder) == rows(whole), f"metrics differ: {folder}"
    mine, theirs = weights(folder), weights(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine), f"weights differ: {folder}"
    # A signal saves at the step that it met, so the older one of the two may be any step.
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert len(names) == 1 + KEEP, names
    assert names[0] == "last.ckpt", names
    assert names[-1] == f"step-{STEPS:08d}.ckpt", names
    assert all(re.fullmatch(r"step-\d{8}\.ckpt", name) for name in names[1:]), names


def run_round(index: int, base: Path, whole: Path, numbers: random.Random) -> str:
    """Interrupts one run and resumes it until it finishes; returns a description."""
    kind = KINDS[index % len(KINDS)]
    folder = base / f"round-{index}"
    done = interrupt(kind, base, folder, numbers)
    more = ["ckpt_path=last"] if [*folder.glob("checkpoints/step-*.ckpt")] else []
    finish(base, folder, *more)
    check(folder, whole)
    return done


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the rounds, and raises AssertionError at the first failed round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    chosen = parser.parse_args(arguments)
    base = chosen.folder.absolute()
    write_corpus(base)
    whole = base / "whole"
    torch.set_num_threads(1)  # as in the processes that `start` starts
    finish(base, whole)
    for index in range(chosen.rounds):
        done = run_round(index, base, whole, random.Random(f"{chosen.seed} {index}"))
        print(f"round {index + 1}/{chosen.rounds}: {done}: bit-equal", flush=True)


if __name__ == "__main__":
    main()
