"""Makes the Markdown table of planned and measured memory from a record in results/memory/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lctrain_kernels.bench.newest import origin
from lctrain_kernels.bench.peers import OURS


def memory_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table of planned and measured memory, with a row per policy and length.

    Args:
        record: Record that `lctrain-bench memory` wrote.
    """
    tiles = record["mlp_tokens"]
    mlp = "whole MLPs" if tiles is None else f"memory.mlp_tokens={tiles}"
    rank = record["rank"]
    trained = "all weights trained" if rank is None else f"LoRA of rank {rank}"
    count = record.get("documents", 1)
    documents = "one document" if count == 1 else f"{count} documents of equal length"
    lines = [
        origin(record),
        "",
        f"{record['shape']}, {record['layers']} layers, {trained}, {record['precision']}, {mlp}; "
        f"{documents}, random weights. GiB on the GPU; tokens/s of forward, backward and AdamW, "
        "from the timed steps in the last column:",
        "",
        "| tokens | contender | memory policy | layers keep | planned | measured peak | reserved "
        "by the allocator | on the host, planned / measured | tokens/s | timed |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(run) for run in record["runs"]),
    ]
    return "\n".join([*lines, ""])


def _row(run: Mapping[str, Any]) -> str:
    cells = [f"{run['tokens']:,}", run.get("contender", OURS), run["policy"]]
    cells.append(_kept(run["layers"]) if "layers" in run else "-")
    cells.append(_gib(run.get("planned_gib")))
    if run["status"] == "ok":
        cells += [_gib(run.get("peak_gib")), _gib(run.get("reserved_gib"))]
    else:
        cells += [run["status"].replace("_", " "), "-"]
    cells.append(f"{_gib(run.get('planned_host_gib'))} / {_gib(run.get('host_gib'))}")
    speed = run.get("tokens_per_s")
    cells += ["-" if speed is None else f"{speed:,.0f}", str(len(run.get("step_ms", ())))]
    return f"| {' | '.join(cells)} |"


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _kept(layers: list[str]) -> str:
    """Returns how many layers keep inputs and attention on which device, as text."""
    places = [layer.split("/") for layer in layers]
    parts = []
    for index, title in enumerate(("inputs", "attention")):
        for place, text in (("device", "on the GPU"), ("host", "on the host")):
            if count := sum(place == kept[index] for kept in places):
                parts.append(f"{title} of {count} {text}")
    return ", ".join(parts) or "nothing"
