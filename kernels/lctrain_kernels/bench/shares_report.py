"""Makes the Markdown table of a document's shares from the newest record in results/shares/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lctrain_kernels.bench.newest import origin


def shares_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table of the efficiency, with a row per exchange.

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
