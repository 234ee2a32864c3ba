"""Makes the Markdown table of work per rank from the newest record in results/balance/."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any


def balance_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table of the imbalance, with a row per mix and number of packs per rank.

    The imbalance is the attention work of the heaviest rank over the mean of all ranks.

    Args:
        record: Record that `lctrain-bench balance` wrote.
    """
    settings = record["settings"]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for result in record["results"]:
        mix = result["mix"]
        groups.setdefault((mix["max_tokens"], mix["sigma"]), []).append(result)
    lines = [
        f"Simulated {record['date'][:10]}: {settings['ranks']} ranks, balance_window "
        f"{settings['window']}, means of {settings['seeds']} seeds.",
        "",
        "| rows | sigma | packs per rank | plain shuffle | lctrain | fill |",
        "|---|---|---|---|---|---|",
    ]
    for (max_tokens, sigma), results in groups.items():
        fill = min(result["fill"] for result in results)
        for packs in results[0]["balanced"]:
            drawn = fmean(result["as_drawn"][packs] for result in results)
            balanced = fmean(result["balanced"][packs] for result in results)
            cells = (
                f"{max_tokens:,}",
                sigma,
                packs,
                *(f"{x:.3f}" for x in (drawn, balanced, fill)),
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])
