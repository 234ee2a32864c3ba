"""Writes the tables of the README: `python -m lctrain.recipes.dual_chunk_extension.table`."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

from lctrain.recipes.dual_chunk_extension.misses import misses
from lctrain.recipes.dual_chunk_extension.scale import TRAIN_RATIO

RESULTS = Path(__file__).parent / "results"
RUNS = {
    RESULTS: "First run",
    RESULTS / "later": "Later run, of every method",
    RESULTS / "wider": "The later run, trained further with keys at both ends of the text",
    RESULTS / "again": "The same further training a second time",
    RESULTS / "uniform": "The same further training without keys at the ends",
}
"""Titles of the recorded runs, by their folder."""
README = Path(__file__).parent / "README.md"
PROGRAM = "python -m lctrain.recipes.dual_chunk_extension.table"
BEGIN, END = "<!-- extension tables: begin -->", "<!-- extension tables: end -->"


def tables(runs: Mapping[Path, str] = RUNS) -> str:
    """Returns the tables of recorded runs as Markdown, between the marks of the README.

    Args:
        runs: Titles of the runs, by the folder with the files of the stages `train`, `perplexity`
            and `passkey`.
    """
    parts = [part for folder, title in runs.items() for part in _run(folder, title)]
    return "\n\n".join([BEGIN, *parts, END])


def _run(folder: Path, title: str) -> list[str]:
    """Returns the tables of a run."""
    record = json.loads((folder / "train.json").read_text())
    first, last = record["held_out_loss"]
    where = f"{record['device']}, torch {record['torch']}, {record['date']}"
    training = f"{record['steps']:,} steps took the held-out loss from {first:.2f} to {last:.2f}."
    parts = [f"### {title}", f"Measured on one {where}. {training}"]
    if (folder / "perplexity_by_method.csv").exists():
        parts.append(_perplexities(_rows(folder / "perplexity_by_method.csv")))
    if folder == RESULTS:
        parts.append("![Passkeys found by depth and length](../../docs/passkeys.png)")
    parts += _passkeys(_rows(folder / "passkey_retrieval.csv"))
    if (folder / "passkey_ends.csv").exists():
        parts.append(_near_ends(_rows(folder / "passkey_ends.csv")))
    return parts


def _near_ends(rows: list[dict[str, str]]) -> str:
    """Returns a table of the keys found by method and length, with a column for every depth."""
    window = min(int(row["length"]) for row in rows)
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        found = cells.setdefault((row["method"], int(row["length"]) // window), {})
        found[row["depth"]] = row["found"]
    depths = list(next(iter(cells.values())))
    lines = [
        f"| {method} | {windows} | {' | '.join(found[depth] for depth in depths)} |"
        for (method, windows), found in cells.items()
    ]
    head = f"| depth | windows | {' | '.join(depths)} |"
    title = f"**Keys near both ends of the text**, of {rows[0]['keys']} in each cell:"
    return "\n".join([title, "", head, f"|{'---|' * (len(depths) + 2)}", *lines])


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _perplexities(rows: list[dict[str, str]]) -> str:
    cells: dict[int, dict[str, str]] = {}
    shortest = min(int(row["length"]) for row in rows)
    for row in rows:
        perplexity, ratio = float(row["perplexity"]), float(row["ratio_to_window"])
        length = int(row["length"])
        text = f"{perplexity:.2f}" + (f" ({ratio:.2f})" if length > shortest else "")
        cells.setdefault(length, {})[row["method"]] = text
    methods = list(dict.fromkeys(row["method"] for row in rows))
    return "\n".join(
        [
            f"**Perplexity** of {int(rows[0]['tokens']):,} tokens of {rows[0]['documents']} "
            "held-out documents; brackets give the ratio to one window:",
            "",
            f"| tokens | {' | '.join(methods)} |",
            f"|{'---|' * (len(methods) + 1)}",
            *(
                f"| {length:,} | {' | '.join(found[name] for name in methods)} |"
                for length, found in sorted(cells.items())
            ),
        ]
    )


def _passkeys(rows: list[dict[str, str]]) -> list[str]:
    """Returns the table of keys found, and what it says at the length of the continued training."""
    shares: dict[str, dict[int, list[tuple[int, int]]]] = {}
    for row in rows:
        by_length = shares.setdefault(row["method"], {})
        by_length.setdefault(int(row["length"]), []).append((int(row["found"]), int(row["keys"])))
    means = {
        method: {length: _share(cells) for length, cells in sorted(by_length.items())}
        for method, by_length in shares.items()
    }
    lengths = sorted(next(iter(means.values())))
    first = next(iter(shares.values()))[lengths[0]]
    depths, keys = len(first), first[0][1]
    table = [
        f"**Passkeys found**, means over {depths} depths of {keys} keys:",
        "",
        f"| windows | {' | '.join(str(length // lengths[0]) for length in lengths)} |",
        f"|{'---|' * (len(lengths) + 1)}",
        *(
            f"| {method} | {' | '.join(f'{found[length]:.0%}' for length in lengths)} |"
            for method, found in means.items()
        ),
    ]
    at = TRAIN_RATIO * lengths[0]
    order = sorted(means, key=lambda method: -means[method][at])
    found = ", ".join(f"{method} {means[method][at]:.0%}" for method in order)
    depths_of = [
        row["depth"] for row in rows if row["method"] == order[0] and row["length"] == str(at)
    ]
    (a, b), depth = min(zip(shares[order[0]][at], depths_of, strict=True))
    said = (
        f"At {TRAIN_RATIO} windows, from most to fewest keys: {found}. "
        f"At its worst depth, {depth}, {order[0]} finds {a / b:.0%}."
    )
    return ["\n".join(table), said, *misses(rows, order[0], at, lengths[0])]


def _share(cells: list[tuple[int, int]]) -> float:
    found, keys = map(sum, zip(*cells, strict=True))
    return found / keys


def main() -> None:
    """Writes the tables into the README."""
    text = README.read_text()
    README.write_text(text.partition(BEGIN)[0] + tables() + text.partition(END)[2])
    print(tables())


if __name__ == "__main__":
    main()
