"""Writes the tables of the README and the picture: `python -m lctrain.recipes.smollm2.table`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lctrain.pluralize import pluralize
from lctrain.recipes.smollm2.continuation import WAYS
from lctrain.recipes.smollm2.picture import PANELS, draw
from lctrain.recipes.smollm2.records import (
    Record,
    gains_beyond,
    gains_of_training,
    mean_scores,
    read_records,
)

README = Path(__file__).parent / "README.md"
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "smollm2.png"
BEGIN = "<!-- smollm2 tables: begin -->"
END = "<!-- smollm2 tables: end -->"


def tables(records: Mapping[str, Record]) -> str:
    """Returns the tables of the recorded runs as Markdown, between the marks of the README."""
    parts = [BEGIN]
    if any(stage in records for stage in PANELS):
        parts.append("![Gain from context of SmolLM2-135M-Instruct](../../docs/smollm2.png)")
    for stage, table in (
        ("gain", _gain),
        ("beyond", _beyond),
        ("needle", _needle),
        ("needle_beyond", _needle_beyond),
        ("ruler", _ruler),
    ):
        if stage in records:
            parts.append(table(records[stage]))
    trained = [records[name] for way in WAYS if (name := f"continue_{way}") in records]
    if trained:
        parts.append(_continued(trained))
    return "\n\n".join([*parts, END])


def _gain(record: Record) -> str:
    first = record["rows"][0]
    rows = [
        (
            f"{row['compared_with']:,} to {row['length']:,}",
            f"{row['gain']:+.4f}",
            _over_novels(row["gain_stderr"]),
            _over_novels(row["gain_low"], row["gain_high"]),
        )
        for row in record["rows"]
    ]
    title = f"**Gain from context**, in nats per token, of {pluralize(first['items'], 'novel')}"
    names = ("context", "gain", "standard error", "95 % interval over novels")
    return _table(record, title, names, rows)


def _beyond(record: Record) -> str:
    found = gains_beyond(record)
    row = record["rows"][0]
    window = record["window"]
    lengths = [length for length, _ in found["plain"] if length > window]
    rows = [
        (f"`{method}`", *(f"{gain:+.3f}" for length, gain in gains if length > window))
        for method, gains in found.items()
    ]
    title = (
        f"**Beyond the window**: gain over a context of {window:,} tokens, in nats per token, of "
        f"{row['tokens']:,} tokens of {pluralize(row['documents'], 'novel')}"
    )
    return _table(record, title, ("method", *(f"{length:,}" for length in lengths)), rows)


def _needle(record: Record) -> str:
    return _scores(record, "**Needles** found within the window", None)


def _needle_beyond(record: Record) -> str:
    return _scores(record, "**Needles** found beyond the window", "method")


def _ruler(record: Record) -> str:
    return _scores(record, "**RULER** within the window", "task")


def _scores(record: Record, title: str, column: str | None) -> str:
    found = mean_scores(record, "score", column)
    strict = mean_scores(record, "strict", column)
    names = list(dict.fromkeys(name for name, _ in found))
    lengths = list(dict.fromkeys(length for _, length in found))
    rows = [
        (
            "all depths" if column is None else f"`{name}`",
            *(f"{found[name, length]:.0%} / {strict[name, length]:.0%}" for length in lengths),
        )
        for name in names
    ]
    each = sum(row["items"] for row in record["rows"]) // len(found)
    title = f"{title}: RULER's score / strict score, {pluralize(each, 'answer')} in each cell"
    return _table(record, title, (column or "", *(f"{n:,}" for n in lengths)), rows)


def _continued(records: Sequence[Record]) -> str:
    first = records[0]
    tokens = first["before"][0]["tokens"]
    rows = []
    for record in records:
        before, after = gains_of_training(record)
        way = record["stage"].removeprefix("continue_")
        rows.append((f"`{way}`", f"{record['steps']}", f"{before:+.4f}", f"{after:+.4f}"))
    title = (
        f"**Continued training** on documents of {first['long']:,} tokens: gain of "
        f"{first['long']:,} tokens of context over {first['window']:,}, in nats per token, of "
        f"{tokens:,} tokens of Persuasion, which is held out"
    )
    times = [record["seconds"] for record in records]
    whole = {**first, "seconds": None if None in times else sum(times)}
    return _table(whole, title, ("way", "steps", "gain before", "gain after"), rows)


def _table(record: Record, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        f"{title}. {record['device']}, torch {record['torch']}, {record['date']}{_time(record)}.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines)


def _time(record: Record) -> str:
    seconds = record["seconds"]
    return "" if seconds is None else f", {seconds:.0f} s"


def _over_novels(*values: float | None) -> str:
    """Returns an error or the ends of an interval; too few novels give neither."""
    given = [value for value in values if value is not None]
    if len(given) < len(values):
        return "needs more novels"
    sign = "+" if len(given) > 1 else ""
    return " to ".join(f"{value:{sign}.4f}" for value in given)


def main() -> None:
    """Writes the tables into the README, and the picture into the documents."""
    records = read_records()
    text = README.read_text()
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    README.write_text(head + tables(records) + tail)
    if any(stage in records for stage in PANELS):
        draw(records, PICTURE)
    print(tables(records))


if __name__ == "__main__":
    main()
