"""Makes the Markdown table of a document's shares from the newest record in results/shares/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lctrain_kernels.bench.newest import origin


def shares_table(record: Mapping[str, Any]) -> str:
    """Returns the efficiency of each exchange, and the cost of FSDP2 on one rank, in Markdown.

    Args:
        record: Record that `lctrain-bench shares` wrote.
    """
    settings = record["settings"]
    lines = [
        origin(record),
        "",
        f"One document of {settings['tokens']:,} tokens, forward and backward of attention, its "
        f"{settings['ranks']} shares one after the other on one GPU, without communication:",
        "",
        *share_rows(record),
    ]
    if record["steps"]:
        lines += [
            "",
            f"Steps of training of {settings['shape']} on the pack mix32k, without and with FSDP2:",
            "",
            *step_rows(record),
        ]
    return "\n".join([*lines, ""])


def share_rows(record: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the table: its head, and a row per exchange."""
    size = record["settings"]["ranks"]
    lines = [f"| exchange, {size} ranks | whole s | slowest share s | efficiency |"]
    lines.append("|---|---|---|---|")
    for row in record["shares"]:
        numbers = (row["whole_seconds"], max(row["share_seconds"]), row["efficiency"])
        lines.append("| {} | {:.4f} | {:.4f} | {:.3f} |".format(row["exchange"], *numbers))
    return lines


def step_rows(record: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the table of steps: its head, and a row per strategy."""
    lines = ["| strategy, one rank | s/step | of plain | GiB |", "|---|---|---|---|"]
    for row in record["steps"]:
        name = "plain" if row["strategy"] == "auto" else row["strategy"]
        numbers = (row["seconds"], row["of_plain"], row["peak_memory_gib"])
        lines.append("| {} | {:.4f} | {:.3f} | {:.2f} |".format(name, *numbers))
    return lines
