"""Makes the Markdown table of shared prompts from a record in results/shared_prefix/."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from lctrain_kernels.bench.newest import origin


def shared_prefix_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table of times with a shared prompt and with separate documents.

    Args:
        record: Record that `lctrain-bench groups` wrote.
    """
    checkpointing = "with" if record["checkpointing"] else "without"
    trained = record.get("trained", "all weights")  # records of 2026-11-30 do not name them
    lines = [
        origin(record),
        "",
        f"{record['shape']}, {trained} trained, {checkpointing} checkpointing, a prompt of "
        f"{record['prompt']:,} tokens and completions of {record['completion']:,}; forward and "
        "backward of a group in milliseconds, and in brackets tokens and peak memory. The overhead "
        "is the time over that of the remaining FLOPs at the rate of separate documents:",
        "",
        "| completions | prompt shared | separate documents | ratio | ratio of FLOPs | overhead |",
        "|---|---|---|---|---|---|",
    ]
    for run in record["runs"]:
        less = run["separate"]["flops"] / run["shared"]["flops"]
        cells = [
            str(run["completions"]),
            _cell(run["shared"]),
            _cell(run["separate"]),
            *(f"{value:.2f}" for value in (run["speedup"], less, less / run["speedup"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(found: Mapping[str, Any]) -> str:
    memory = f", {found['peak_gib']:.1f} GiB" if "peak_gib" in found else ""
    return f"{median(found['step_ms']):,.1f} ({found['tokens']:,}{memory})"
