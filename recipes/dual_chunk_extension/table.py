"""Writes the tables of the README: `python -m lctrain.recipes.dual_chunk_extension.table`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from lctrain.recipes.dual_chunk_extension.misses import misses
from lctrain.recipes.dual_chunk_extension.scale import TRAIN_RATIO

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
PROGRAM = "python -m lctrain.recipes.dual_chunk_extension.table"
BEGIN, END = "<!-- extension tables: begin -->", "<!-- extension tables: end -->"


def tables(results: Path = RESULTS) -> str:
    """Returns the tables of the recorded run as Markdown, between the marks of the README.

    Args:
        results: Folder with the files of the stages `train`, `perplexity` and `passkey`.
    """
    record = json.loads((results / "train.json").read_text())
    parts = [f"Measured on one {record['device']}, torch {record['torch']}, {record['date']}."]
    parts += [_perplexities(_rows(results / "perplexity_by_method.csv"))]
    parts += ["![Passkeys found by depth and length](../../docs/passkeys.png)"]
    parts += _passkeys(_rows(results / "passkey_retrieval.csv"))
    return "\n\n".join([BEGIN, *parts, END])


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
    depths = len(shares["plain"][lengths[0]])
    keys = shares["plain"][lengths[0]][0][1]
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
