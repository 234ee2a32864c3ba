"""Makes the table of whole training steps from the records in results/step/."""

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
    """Returns the newest record of whole steps, by the name of its file."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [record for record in records if "runs" in record][-1]


def step_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table: tokens/s and peak memory of each contender, and their ratio.

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
    lines = [
        f"One {record['device']}, {record['date']}, {record['settings']['dtype']}, forward and "
        f"backward without an optimizer, each contender in a process of its own; {versions}.",
        "",
        f"| shape | pack | checkpointing | {' | '.join(contenders)} | ratio |",
        "|---|---|---|" + "---|" * (len(contenders) + 1),
    ]
    for shape, workload, checkpointing in settings:
        found = [
            _newest(runs, contender, shape, workload, checkpointing) for contender in contenders
        ]
        cells = " | ".join(_cell(run) for run in found)
        ratio = "-" if None in found else f"{_ratio(found):.2f}"
        lines.append(f"| {shape} | {workload} | {checkpointing} | {cells} | {ratio} |")
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


def _ratio(found: Sequence[Any]) -> float:
    return found[0]["tokens_per_s"] / max(run["tokens_per_s"] for run in found[1:])


def _cell(run: Run | None) -> str:
    return "-" if run is None else f"{run['tokens_per_s']:,.0f} ({run['peak_gib']:.1f} GiB)"
