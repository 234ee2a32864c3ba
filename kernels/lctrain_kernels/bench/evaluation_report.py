"""Makes the Markdown tables of evaluation from the newest record in results/evaluation/."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

from lctrain_kernels.bench.newest import origin

PARTS = ("perplexity", "answers", "suite")

Row = Mapping[str, Any]


def evaluation_table(record: Mapping[str, Any]) -> str:
    """Returns the times of evaluation tasks beside those of forward passes, in Markdown.

    Args:
        record: Record that `lctrain-bench evaluation` wrote.
    """
    return "\n".join([origin(record), "", *evaluation_lines(record), ""])


def evaluation_lines(record: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the tables of all parts that were run."""
    tables = {"perplexity": _perplexity, "answers": _answers, "suite": _suite}
    lines: list[str] = []
    for part in PARTS:
        for shape, rows in groupby(record[part], key=lambda row: row["shape"]):
            lines += [*([""] if lines else []), *tables[part](shape, rows)]
    return lines


def _perplexity(shape: str, rows: Iterable[Row]) -> list[str]:
    return [
        f"{shape}, the task `perplexity`, and forward passes with the fused loss over the same "
        "documents, without gradients. The speed is that of the task over theirs:",
        "",
        "| context | documents | tokens/s | speed |",
        "|---|---|---|---|",
        *(_line(f"{row['length']:,}", row, _speed, 3) for row in rows),
    ]


def _answers(shape: str, rows: Iterable[Row]) -> list[str]:
    return [
        f"{shape}, tasks that ask for answers, and forward passes over as many documents that fill "
        "the context, without logits:",
        "",
        "| task | context | prompts | seconds | forward passes, s | ratio |",
        "|---|---|---|---|---|---|",
        *(_line(f"`{row['task']}`", row, _ratio, 5) for row in rows),
    ]


def _suite(shape: str, rows: Iterable[Row]) -> list[str]:
    kept = list(rows)
    lengths = ", ".join(f"{length:,}" for length in kept[0]["lengths"])
    whole = all("seconds" in row for row in kept)
    lines = [_line(f"`{row['task']}`", row, _time, 1) for row in kept]
    if whole:
        lines.append(f"| all | {sum(row['seconds'] for row in kept):.0f} |")
    return [
        f"{shape}, `lctrain-eval` at {lengths} tokens, each task with loading and report:",
        "",
        "| task | seconds |",
        "|---|---|",
        *lines,
    ]


def _line(name: str, row: Row, cells: Callable[[Row], list[str]], count: int) -> str:
    """Returns a row of a table; without a result, its cells are a reason and dashes."""
    if "error" in row:
        reason = "not run" if row["error"].startswith("not run") else "error"
        return f"| {name} | {' | '.join([reason, *['-'] * (count - 1)])} |"
    return f"| {name} | {' | '.join(cells(row))} |"


def _speed(row: Row) -> list[str]:
    rate = row["tokens"] / row["seconds"]
    return [f"{row['documents']}", f"{rate:,.0f}", f"{row['speed_ratio']:.2f}"]


def _ratio(row: Row) -> list[str]:
    return [
        f"{row['length']:,}",
        f"{row['prompts']}",
        f"{row['seconds']:.1f}",
        f"{row['prefill_seconds']:.1f}",
        f"{row['time_ratio']:.2f}",
    ]


def _time(row: Row) -> list[str]:
    return [f"{row['seconds']:.0f}"]
