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
        "| exchange | whole s | slowest share s | efficiency |",
        "|---|---|---|---|",
    ]
    for row in record["shares"]:
        numbers = (row["whole_seconds"], max(row["share_seconds"]), row["efficiency"])
        lines.append("| {} | {:.4f} | {:.4f} | {:.3f} |".format(row["exchange"], *numbers))
    return "\n".join([*lines, ""])
