"""Makes the Markdown table of supervised fine-tuning from a record in results/sft/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lctrain_kernels.bench.newest import origin


def sft_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table of trained tokens per second, and lctrain's speed over each peer.

    Args:
        record: Record that `lctrain-bench sft` wrote.
    """
    settings = record["settings"]
    lines = [
        origin(record),
        "",
        f"{record['shape']}, all weights trained with AdamW, conversations of "
        f"{settings['mean_tokens']} tokens on average, rows of {settings['row_tokens']:,} tokens "
        f"or {settings['rows']} padded conversations, no checkpointing; each contender in a "
        f"process of its own, {settings['steps']} steps:",
        "",
        "| contender | trained tokens per second | share of positions that are trained on "
        "| peak memory, GiB | lctrain's speed over it |",
        "|---|---|---|---|---|",
    ]
    found = {run["contender"]: run for run in record["runs"]}
    ours = found.get("lctrain", {}).get("trained_tokens_per_s")
    for run in record["runs"]:
        if run["status"] != "ok":
            status = str(run["status"]).replace("_", " ")
            lines.append(f"| {run['title']} | {status} | - | - | - |")
            continue
        speed, peak = run["trained_tokens_per_s"], run["peak_gib"]
        share = run["trained_tokens"] / run["positions"]
        memory = "-" if peak is None else f"{peak:.1f}"
        ratio = "-" if ours is None or run["contender"] == "lctrain" else f"{ours / speed:.2f}"
        lines.append(f"| {run['title']} | {speed:,.0f} | {share:.0%} | {memory} | {ratio} |")
    return "\n".join([*lines, ""])
