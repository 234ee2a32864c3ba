"""Makes the Markdown tables of evaluation from the records in results/evaluation/."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from lctrain_kernels.bench.newest import origin

PARTS = ("perplexity", "answers", "generated", "document", "suite")
SUITE_DOCUMENTS, SUITE_ITEMS = 32, 10
"""Documents of perplexity, and prompts of each of RULER's tasks, in the whole suite."""

Row = Mapping[str, Any]


def evaluation_tables(records: Sequence[Row]) -> str:
    """Returns the tables of all records, without rows that a better record has too.

    A record is better if it has a time where the other has none, or is newer. A suite counts as a
    whole, since its sum is of one run.

    Args:
        records: Records that `lctrain-bench evaluation` wrote, in the order of their dates.
    """
    units = [_units(record) for record in records]
    best: dict[tuple[str, ...], tuple[bool, int]] = {}
    for index, of in enumerate(units):
        for unit, rows in of.items():
            measured = all("error" not in row for row in rows)
            best[unit] = max(best.get(unit, (False, index)), (measured, index))
    tables = []
    for index, (record, of) in enumerate(zip(records, units, strict=True)):
        kept: dict[str, list[Row]] = {part: [] for part in PARTS}
        for unit, rows in of.items():
            if best[unit][1] == index:
                kept[unit[0]] += rows
        if any(kept.values()):
            tables.append(evaluation_table({**record, **kept}))
    return "\n".join(tables)


def _units(record: Row) -> dict[tuple[str, ...], list[Row]]:
    """Returns a record's rows by what they time: suites of a shape, or a row each."""
    units: dict[tuple[str, ...], list[Row]] = {}
    for part in PARTS:
        for row in record.get(part, ()):
            name = "" if part == "suite" else str(row.get("task", row.get("length")))
            units.setdefault((part, row["shape"], name), []).append(row)
    return units


def evaluation_table(record: Mapping[str, Any]) -> str:
    """Returns the times of evaluation tasks beside those of forward passes, in Markdown.

    Args:
        record: Record that `lctrain-bench evaluation` wrote.
    """
    return "\n".join([origin(record), "", *evaluation_lines(record), ""])


def evaluation_lines(record: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the tables of all parts that were run."""
    tables = {"perplexity": _perplexity, "document": _document, "suite": _suite}
    lines: list[str] = []
    for part in PARTS:
        for shape, rows in groupby(record.get(part, ()), key=lambda row: row["shape"]):
            lines += [*([""] if lines else []), *tables.get(part, _answers)(shape, rows)]
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
        "the context, without logits. The ratio leaves out the first run, which may compile "
        "kernels. A dash: timed once, after one prompt:",
        "",
        "| task | context | prompts | first run, s | seconds | forward passes, s | ratio |",
        "|---|---|---|---|---|---|---|",
        *(_line(f"`{row['task']}`", row, _ratio, 6) for row in rows),
    ]


def _document(shape: str, rows: Iterable[Row]) -> list[str]:
    return [
        f"{shape}, the task `perplexity` on one document that is one window. The memory is the "
        "most that torch had allocated, the weights among it; logits of all tokens are never made:",
        "",
        "| tokens | seconds | tokens/s | memory, GiB | weights, GiB | logits in float32, GiB |",
        "|---|---|---|---|---|---|",
        *(_line(f"{row.get('tokens', 0):,}", row, _memory, 5) for row in rows),
    ]


def _suite(shape: str, rows: Iterable[Row]) -> list[str]:
    kept = list(rows)
    lengths = ", ".join(f"{length:,}" for length in kept[0]["lengths"])
    lines = [_line(f"`{row['task']}`", row, _time, 2) for row in kept]
    if all("seconds" in row for row in kept):
        lines.append(f"| all | | {sum(row['seconds'] * _whole(row)[0] for row in kept):.0f} |")
    projected = any("seconds" in row and _whole(row)[0] > 1 for row in kept)
    return [
        f"{shape}, `lctrain-eval` at {lengths} tokens, each task with loading and report:",
        "",
        f"| task | measured | seconds{', projected' if projected else ''} |",
        "|---|---|---|",
        *lines,
    ]


def _whole(row: Row) -> tuple[float, str]:
    """Returns the factor from what was measured of a suite's task to all of it, and its name."""
    measured, whole, unit = {
        "perplexity": (row.get("documents", SUITE_DOCUMENTS), SUITE_DOCUMENTS, "documents"),
        "ruler": (row.get("items", SUITE_ITEMS), SUITE_ITEMS, "prompts of each task"),
    }.get(row["task"], (1, 1, ""))
    if measured >= whole:
        return 1.0, "all of it"
    return whole / measured, f"{measured} of {whole} {unit}, {row['seconds']:.0f} s"


def _line(name: str, row: Row, cells: Callable[[Row], list[str]], count: int) -> str:
    """Returns a row of a table; without a result, its cells are a reason and dashes."""
    if "error" in row:
        reason = "not run" if row["error"].startswith("not run") else "error"
        return f"| {name} | {' | '.join([reason, *['-'] * (count - 1)])} |"
    return f"| {name} | {' | '.join(cells(row))} |"


def _speed(row: Row) -> list[str]:
    rate = row["tokens"] / row["seconds"]
    return [f"{row['documents']}", f"{rate:,.0f}", f"{row['speed_ratio']:.2f}"]


def _memory(row: Row) -> list[str]:
    of = (row.get(f"{name}_bytes") for name in ("peak", "weights", "logits"))
    sizes = ["-" if size is None else f"{size / 2**30:.1f}" for size in of]
    return [f"{row['seconds']:.0f}", f"{row['tokens'] / row['seconds']:,.0f}", *sizes]


def _ratio(row: Row) -> list[str]:
    lengths = dict.fromkeys([row.get("shortest", row["length"]), row["length"]])
    return [
        " to ".join(f"{length:,}" for length in lengths),
        f"{row['prompts']}",
        f"{row['first_seconds']:.1f}" if "first_seconds" in row else "-",
        f"{row['seconds']:.1f}",
        f"{row['prefill_seconds']:.1f}",
        f"{row['time_ratio']:.2f}",
    ]


def _time(row: Row) -> list[str]:
    factor, measured = _whole(row)
    return [measured, f"{row['seconds'] * factor:.0f}"]
