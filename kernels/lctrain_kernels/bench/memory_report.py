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
SEVERAL = ", packs of "
"""Part of the name of a contender whose packs hold several documents."""
_ALT = "Peak memory and tokens per second against context length"
_PLACES = (
    ("device", "on the GPU"),
    ("host", "on the host"),
    ("rebuilt", "from the run that rebuilds the next input"),
)
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
    """Returns the fastest run of every contender at every length.

    The records of the model with most measured lengths of one document are taken. A measured run
    counts before an estimate, and the later of two records with the same setting before the other.
    Packs of several documents are contenders of their own.

    Args:
        records: Records that `lctrain-bench memory` wrote, in the order of their dates.

    Returns:
        Runs by contender and number of tokens; empty if fewer than two lengths were measured.
    """
    groups: dict[Any, Points] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        points = groups[record["shape"], record["layers"], record["rank"], record["precision"]]
        count = record.get("documents", 1)
        packs = f"{SEVERAL}{count} documents" if count > 1 else ""
        fastest: Points = defaultdict(dict)
        for run in record["runs"]:
            if is_estimate(run) or (run["status"] == "ok" and "peak_gib" in run):
                found = fastest[run.get("contender", OURS) + packs]
                known = found.get(run["tokens"])
                if known is None or _rank(known) < _rank(run):
                    found[run["tokens"]] = run
        for contender, runs in fastest.items():
            for tokens, run in runs.items():
                known = points[contender].get(tokens)
                if known is None or is_estimate(known) or not is_estimate(run):
                    points[contender][tokens] = run
    most = max(groups.values(), key=_lengths, default={})
    return most if _lengths(most) > 1 else {}


def is_estimate(run: Mapping[str, Any]) -> bool:
    """Returns whether a run's time is estimated, from fewer layers or from a part of the step."""
    return "estimated_from" in run


def _rank(run: Mapping[str, Any]) -> tuple[bool, float]:
    """Returns a key that is larger for measured runs, and among these for faster ones."""
    return not is_estimate(run), run["tokens_per_s"]


def _lengths(points: Points) -> int:
    """Returns the number of lengths of one document that were measured."""
    return len(
        {
            tokens
            for contender, runs in points.items()
            for tokens, run in runs.items()
            if SEVERAL not in contender and not is_estimate(run)
        }
    )


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
        cells += [_stopped(run), "-"]
    cells.append(f"{_gib(run.get('planned_host_gib'))} / {_gib(run.get('host_gib'))}")
    speed = run.get("tokens_per_s")
    cells += ["-" if speed is None else f"{speed:,.0f}", _timed(run)]
    return f"| {' | '.join(cells)} |"


def _stopped(run: Mapping[str, Any]) -> str:
    """Returns why a run has no figures; of a step that was stopped, the peak until then."""
    status = str(run["status"]).replace("_", " ")
    if run["status"] != "unfinished" or "peak_gib" not in run or not run.get("progress"):
        return status
    phase, layer, seconds = run["progress"][-1]
    return f"{_gib(run['peak_gib'])} until layer {layer} of the {phase}, {seconds:,.0f} s; {status}"


def _timed(run: Mapping[str, Any]) -> str:
    """Returns the number of timed steps, or what a run is estimated from."""
    if "estimated_from" not in run:
        return str(len(run.get("step_ms", ())))
    source = run["estimated_from"]
    if isinstance(source, int):
        return f"estimate from the step until layer {source} of the backward"
    few, more = source
    return f"estimate from {few} and {more} layers"


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _kept(layers: list[str]) -> str:
    """Returns how many layers keep inputs and attention on which device, as text."""
    places = [layer.split("/") for layer in layers]
    parts = []
    for index, title in enumerate(("inputs", "attention")):
        for place, text in _PLACES:
            if count := sum(place == kept[index] for kept in places):
                parts.append(f"{title} of {count} {text}")
    return ", ".join(parts) or "nothing"
