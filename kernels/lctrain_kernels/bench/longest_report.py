"""Makes the Markdown table of planned longest contexts from the record in results/longest/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def longest_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table of the longest planned context, by machine and model.

    Args:
        record: Record that `lctrain-bench longest` wrote.
    """
    plans = record["plans"]
    models = list(dict.fromkeys(plan["model"] for plan in plans))
    machines = list(dict.fromkeys((plan["device_gib"], plan["host_gib"]) for plan in plans))
    tokens = {
        (plan["model"], plan["device_gib"], plan["host_gib"]): plan["tokens"] for plan in plans
    }
    lines = [
        f"Planned {record['date'][:10]}, not measured: tokens of one document, LoRA of rank "
        f"{record['rank']}, `memory=auto`, `memory.mlp_tokens={record['mlp_tokens']}`. The models "
        "have random weights in the format that is named:",
        "",
        f"| GPU, GiB | host memory used, GiB | {' | '.join(models)} |",
        f"|---|---|{'---|' * len(models)}",
    ]
    for device, host in machines:
        cells = [tokens[model, device, host] for model in models]
        shown = " | ".join(f"{count:,}" if count else "does not fit" for count in cells)
        lines.append(f"| {device} | {host} | {shown} |")
    return "\n".join([*lines, ""])
