"""Compares all runs: means and standard errors over seeds, as a table and files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lctrain.recipes.differential.comparison_plot import plot_comparison
from lctrain.recipes.differential.experiment import Experiment
from lctrain.recipes.differential.variant import VARIANTS
from lctrain_kernels.strict_json import number

COLUMNS = ("held_out_loss", "tokens_per_second", "largest_logit", "key_loss", "peak_memory_gib")

MEASURED = ("held_out_loss", "largest_logit", "key_loss")
"""Results that are not finite if a run has diverged."""


def collect_runs(experiment: Experiment) -> None:
    """Reads the records of all runs, prints the table, and writes differential.json, .csv, .png."""
    runs = read_runs(experiment)
    summary = summarize(runs)
    experiment.save("differential", {"summary": summary, "runs": runs})
    write_runs(experiment, runs)
    plot_comparison(runs, experiment.output / "differential.png")
    print(as_text(summary))


def read_runs(experiment: Experiment) -> list[dict[str, Any]]:
    """Returns the results of every run, ordered by variant, then by seed.

    Raises:
        ValueError: if a run is missing.
    """
    paths = {run: experiment.record(*run) for run in experiment.runs}
    missing = [path.stem for path in paths.values() if not path.is_file()]
    if missing:
        raise ValueError(
            f"output must hold every run, got {experiment.output} without {', '.join(missing)}. "
            "Run the stage train for them, or leave them out with --variants and --seeds."
        )
    records = [read_run(path) for path in paths.values()]
    return sorted(records, key=lambda run: experiment.variants.index(run["variant"]))


def read_run(path: Path) -> dict[str, Any]:
    """Returns the results of a run; NaN for those of a diverged run, which are null in the file.

    Args:
        path: JSON file of the run.
    """
    run: dict[str, Any] = json.loads(path.read_text())
    return run | {name: number(run[name]) for name in MEASURED if name in run}


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the mean and the standard error over seeds of every result, by variant.

    `held_out_loss_difference` is the difference from the plain model with the same seed. Both saw
    the same batches, so part of the variation between seeds cancels.
    """
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_variant.setdefault(run["variant"], []).append(run)
    plain = {run["seed"]: run["held_out_loss"] for run in by_variant.get("plain", [])}
    summary: dict[str, dict[str, Any]] = {}
    for name, group in by_variant.items():
        row: dict[str, Any] = {
            "runs": len(group),
            "parameters": group[0]["parameters"],
            "key_loss_of_guessing": group[0]["key_loss_of_guessing"],
            **{column: over_seeds([run[column] for run in group]) for column in COLUMNS},
            "passkeys": {
                length: over_seeds([run["passkeys"][length] for run in group])
                for length in group[0]["passkeys"]
            },
        }
        if name != "plain" and plain.keys() >= {run["seed"] for run in group}:
            row["held_out_loss_difference"] = over_seeds(
                [run["held_out_loss"] - plain[run["seed"]] for run in group]
            )
        summary[name] = row
    return summary


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Returns the mean, its standard error (None for one seed) and the values."""
    mean = sum(values) / len(values)
    error = None
    if len(values) > 1:
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        error = math.sqrt(variance / len(values))
    return {"mean": mean, "standard_error": error, "values": list(values)}


def write_runs(experiment: Experiment, runs: Sequence[dict[str, Any]]) -> None:
    """Writes a CSV with one row per run."""
    names = ["variant", "seed", "parameters", "steps", *COLUMNS]
    lengths = list(runs[0]["passkeys"])
    with (experiment.output / "differential.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *(f"passkeys_{length}" for length in lengths)])
        for run in runs:
            found = [run["passkeys"][length] for length in lengths]
            writer.writerow([*(run[name] for name in names), *found])


def as_text(summary: dict[str, dict[str, Any]]) -> str:
    """Returns the table for the terminal."""
    longest = list(next(iter(summary.values()))["passkeys"])[-1]
    lines = [
        f"{'':<28}{'parameters':>12}{'held-out loss':>18}{'minus plain':>18}{'tokens/s':>20}"
        f"{'largest logit':>16}{f'keys at {int(longest):,}':>16}{'loss of keys':>16}"
    ]
    for name, row in summary.items():
        difference = row.get("held_out_loss_difference")
        lines.append(
            f"{VARIANTS[name].title:<28}{row['parameters']:>12,}"
            f"{_with_error(row['held_out_loss'], '.4f'):>18}"
            f"{_with_error(difference, '+.4f') if difference else '-':>18}"
            f"{_with_error(row['tokens_per_second'], ',.0f'):>20}"
            f"{_with_error(row['largest_logit'], '.1f'):>16}"
            f"{_with_error(row['passkeys'][longest], '.0%'):>16}"
            f"{_with_error(row['key_loss'], '.2f'):>16}"
        )
    seeds = max(row["runs"] for row in summary.values())
    lines.append(f"± one standard error over {seeds} seeds" if seeds > 1 else "one seed")
    guessing = next(iter(summary.values()))["key_loss_of_guessing"]
    lines[-1] += f"; the loss of guessing keys among their words is {guessing:.2f}"
    return "\n".join(lines)


def _with_error(cell: dict[str, Any], form: str) -> str:
    text = format(cell["mean"], form)
    if cell["standard_error"] is None:
        return text
    return f"{text} ±{format(cell['standard_error'], form.removeprefix('+'))}"
