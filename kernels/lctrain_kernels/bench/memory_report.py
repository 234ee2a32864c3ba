"""Makes the Markdown tables of planned and measured memory from the records in results/memory/."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lctrain_kernels.bench.memory_published import published_table
from lctrain_kernels.bench.newest import RESULTS, origin, records_of
from lctrain_kernels.bench.peers import OURS

PICTURE = "long_context.png"
_ALT = "Peak memory and tokens per second against context length"
Points = dict[str, dict[int, Mapping[str, Any]]]


def memory_records(results: Path = RESULTS) -> list[dict[str, Any]]:
    """Returns all records in results/memory/, in the order of their dates.

    Args:
        results: Folder that holds the folders of all kinds.
    """
    return records_of("memory", results)


def memory_tables(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the tables of all records; if there is a curve, also its picture and others' figures.

    Args:
        records: Records that `lctrain-bench memory` wrote.
    """
    tables = [memory_table(record) for record in records]
    if curve_of(records):
        tables += [f"![{_ALT}]({PICTURE})\n", published_table()]
    return "\n".join(tables)


def curve_of(records: Sequence[Mapping[str, Any]]) -> Points:
    """Returns the fastest measured run of every contender at every length, of one document.

    The records of the model with most measured lengths are taken. The later of two records with the
    same setting counts.

    Args:
        records: Records that `lctrain-bench memory` wrote, in the order of their dates.

    Returns:
        Runs by contender and number of tokens; empty if fewer than two lengths were measured.
    """
    groups: dict[Any, Points] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record.get("documents", 1) > 1:
            continue
        points = groups[record["shape"], record["layers"], record["rank"], record["precision"]]
        fastest: Points = defaultdict(dict)
        for run in record["runs"]:
            if run["status"] == "ok" and "peak_gib" in run and "estimated_from" not in run:
                found = fastest[run.get("contender", OURS)]
                known = found.get(run["tokens"])
                if known is None or known["tokens_per_s"] < run["tokens_per_s"]:
                    found[run["tokens"]] = run
        for contender, runs in fastest.items():
            points[contender].update(runs)
    most = max(groups.values(), key=_lengths, default={})
    return most if _lengths(most) > 1 else {}


def _lengths(points: Points) -> int:
    return len({tokens for runs in points.values() for tokens in runs})


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
    cells += ["-" if speed is None else f"{speed:,.0f}", _timed(run)]
    return f"| {' | '.join(cells)} |"


def _timed(run: Mapping[str, Any]) -> str:
    """Returns the number of timed steps, or from which numbers of layers a run is estimated."""
    if "estimated_from" not in run:
        return str(len(run.get("step_ms", ())))
    few, more = run["estimated_from"]
    return f"estimate from {few} and {more} layers"


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
