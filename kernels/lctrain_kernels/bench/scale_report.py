"""Makes the Markdown tables of several GPUs from the newest record in results/scale/."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lctrain_kernels.bench.newest import RESULTS, newest_record, origin

NOT_MEASURED = "Not measured on several GPUs.\n"


def newest_scale_record(results: Path = RESULTS) -> dict[str, Any] | None:
    """Returns the newest record of several GPUs; None if there are records of CPUs or one GPU only.

    Args:
        results: Folder that holds the folders of all kinds.
    """
    return newest_record("scale", results, _is_of_several_gpus)


def _is_of_several_gpus(record: Mapping[str, Any]) -> bool:
    return record["device"] != "cpu" and record["settings"]["ranks"] > 1


def scale_table(record: Mapping[str, Any]) -> str:
    """Returns the Markdown tables of a record: training steps, shared documents, and spread.

    Args:
        record: Record that `lctrain-bench scale` wrote; tables without a measured part are left
            out.
    """
    parts = record["parts"]
    size = record["settings"]["ranks"]
    text = origin(record).replace("One ", f"{size} x ", 1) if size > 1 else origin(record)
    tables = [text, *_failed(parts), _steps(parts, record), _shared(parts), _spread(parts)]
    return "\n\n".join(table for table in tables if table) + "\n"


def _failed(parts: Mapping[str, Any]) -> list[str]:
    found = {name: part["error"] for name, part in parts.items() if "error" in part}
    return [f"Part {name} failed: {error}" for name, error in found.items()]


def _steps(parts: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Returns the table of training steps; the speed of linear is that of the same model alone."""
    rows = [row for name in ("linear", "copies", "whole") for row in _rows(parts, name)]
    alone = {row["shape"]: row for row in rows if row["strategy"] == "alone"}
    settings = record["settings"]
    lines = [
        f"Training steps on packs of {settings['tokens']:,} tokens, {settings['documents']} "
        "documents each, one pack per GPU:",
        "",
        "| model | parameters | GPUs | s/step | tokens/s per GPU | of linear | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        single = alone.get(row["shape"])
        speed = row["tokens_per_second_per_gpu"]
        linear = None if single is None else speed / single["tokens_per_second_per_gpu"]
        cells = [row["shape"], _title(row), str(row["gpus"]), f"{row['seconds']:.3f}"]
        cells += [f"{speed:,.0f}", _number(linear, 3), f"{row['peak_memory_gib']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if rows else ""


def _title(row: Mapping[str, Any]) -> str:
    title = {"alone": "on one GPU", "ddp": "copied (DDP)", "fsdp2": "divided (FSDP2)"}
    memory = f", memory={row['memory']}" if "memory" in row else ""
    return title[row["strategy"]] + memory


def _shared(parts: Mapping[str, Any]) -> str:
    lines = []
    for name in ("attention", "context", "attention-long", "context-long"):
        for row in _rows(parts, name):
            part = parts[name]
            whole = row.get("whole_seconds", part.get("whole_seconds"))
            what = f"step, {part['shape']}" if "shape" in part else "attention"
            cells = [f"{part['tokens']:,}", what, row["exchange"], _number(whole, 3)]
            cells.append(f"{row.get('share_seconds', row.get('seconds')):.3f}")
            cells += [f"{row['predicted_seconds']:.3f}", _number(row["efficiency"], 3)]
            lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return ""
    head = [
        "One document that all GPUs share; forward and backward of one attention layer, or a whole "
        "training step. The prediction is that of the cost model, at the speed of one GPU:",
        "",
        "| tokens | what | exchange | one GPU s | all GPUs s | predicted s | of linear |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *lines])


def _spread(parts: Mapping[str, Any]) -> str:
    part = parts.get("spread", {})
    if "orders" not in part:
        return ""
    mix = part["mix"]
    lines = [
        f"Forward and backward of every rank's own packs, {part['shape']}, rows of "
        f"{mix['max_tokens']:,} tokens, log-normal lengths (sigma {mix['sigma']}). The slowest "
        "rank of a step over the mean of the ranks:",
        "",
        "| order | by time | by model FLOPs | s, waiting for the slowest |",
        "|---|---|---|---|",
    ]
    for row in part["orders"]:
        spreads = f"{row['seconds_spread']:.3f} | {row['flops_spread']:.3f}"
        lines.append(f"| {row['order']} | {spreads} | {row['seconds']:.2f} |")
    return "\n".join(lines)


def _rows(parts: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = parts.get(name, {}).get("rows", [])
    return rows


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
