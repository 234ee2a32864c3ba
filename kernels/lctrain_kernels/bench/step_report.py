"""Makes the Markdown tables of whole training steps from the records in results/step/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STEP_RESULTS = Path(__file__).parent / "results" / "step"
KEPT = "every layer, attention outputs kept"
CHECKPOINTED = "every layer"

Run = Mapping[str, Any]


def newest_step_record(folder: Path = STEP_RESULTS) -> dict[str, Any]:
    """Returns the newest record of whole training steps in a folder, by its file name."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [record for record in records if "runs" in record][-1]


def step_table(record: Mapping[str, Any]) -> str:
    """Returns Markdown tables: tokens/s, memory and MFU of each contender, and their ratios.

    Of several runs of one setting, the table shows the newest, because earlier runs timed earlier
    code. A run that keeps attention outputs is compared with contenders that checkpoint every
    layer, because the other contenders have no other kind of checkpointing.

    Args:
        record: The contents of a file in results/step/.
    """
    runs: Sequence[Run] = record["runs"]
    contenders = list(dict.fromkeys(run["contender"] for run in runs))
    settings = list(
        dict.fromkeys((run["shape"], run["workload"], run["checkpointing"]) for run in runs)
    )
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    with_optimizer = record["settings"].get("optimizer", False)
    work = "with fused AdamW" if with_optimizer else "without an optimizer"
    lines = [
        f"One {record['device']}, {record['date'][:10]}, {record['settings']['dtype']}, forward "
        f"and backward {work}, each contender in a process of its own; {versions}.",
        "",
        f"| shape | pack | checkpointing | {' | '.join(contenders)} | ratio |",
        "|---|---|---|" + "---|" * (len(contenders) + 1),
    ]
    ratios = []
    for setting in settings:
        found = [_newest(runs, contender, *setting) for contender in contenders]
        head = f"| {' | '.join(setting)} | "
        lines.append(f"{head}{' | '.join(_cell(run) for run in found)} | {_best(found)} |")
        ratios.append(f"{head}{' | '.join(_ratio(found[0], run) for run in found[1:])} |")
    if len(contenders) > 2:
        lines += [
            "",
            "The ratio is over the fastest of the others. Tokens/s over those of each:",
            "",
            f"| shape | pack | checkpointing | {' | '.join(contenders[1:])} |",
            "|---|---|---|" + "---|" * (len(contenders) - 1),
            *ratios,
        ]
    if missing := record.get("missing"):
        names = "; ".join(f"{title} ({reason})" for title, reason in missing.items())
        lines += ["", f"Not measured: {names}."]
    return "\n".join([*lines, ""])


def _newest(
    runs: Sequence[Run], contender: str, shape: str, workload: str, checkpointing: str
) -> Run | None:
    if checkpointing == KEPT and contender != runs[0]["contender"]:
        checkpointing = CHECKPOINTED
    wanted = contender, shape, workload, checkpointing
    fields = ("contender", "shape", "workload", "checkpointing")
    found = [run for run in runs if tuple(run[field] for field in fields) == wanted]
    return max(found, key=lambda run: run["run"], default=None)


def _speed(run: Run | None) -> float | None:
    """Returns a run's tokens/s; None if it has none."""
    return None if run is None else run.get("tokens_per_s")


def _best(found: Sequence[Run | None]) -> str:
    """Returns the ratio of the first run's speed to that of the fastest other run, as text.

    The text is a dash if the first run or all others are missing.
    """
    others = [run for run in found[1:] if _speed(run)]
    return _ratio(found[0], max(others, key=lambda run: _speed(run) or 0.0, default=None))


def _ratio(ours: Run | None, theirs: Run | None) -> str:
    mine, other = _speed(ours), _speed(theirs)
    return f"{mine / other:.2f}" if mine and other else "-"


def _cell(run: Run | None) -> str:
    if run is None:
        return "-"
    if not _speed(run):
        return str(run["status"]).replace("_", " ")
    notes = []
    if run.get("peak_gib") is not None:
        notes.append(f"{run['peak_gib']:.1f} GiB")
    if run.get("mfu") is not None:
        notes.append(f"MFU {run['mfu']:.2f}")
    return f"{run['tokens_per_s']:,.0f}" + (f" ({', '.join(notes)})" if notes else "")
