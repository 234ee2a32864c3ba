"""Compares ways beyond the window on the shipped model: `python -m ...passkey_model.methods`.

The texts are the files that the model's training left out, as in the recipe itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lctrain.data.passkey import PasskeyFormat
from lctrain.data.sources import StdlibSource
from lctrain.eval import METHODS, Extension, passkey_retrieval
from lctrain.eval.shipped import SHIPPED, load_passkey_model
from lctrain.recipes.output import messages
from lctrain.recipes.passkey_model.__main__ import DEPTHS, HELD_OUT, TEXT_BYTES, WINDOW
from lctrain.warn import begin_warnings

PROGRAM = "python -m lctrain.recipes.passkey_model.methods"
RATIOS = (1, 2, 4, 8)
RESULTS = Path(__file__).parent / "results" / "passkeys_by_method.json"
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- method tables: begin -->", "<!-- method tables: end -->"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the share of passkeys that the shipped model finds, by method and length."""
    begin_warnings()
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Measures how many passkeys the shipped model finds, by every method.",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/passkey_methods"))
    parser.add_argument("--keys", type=int, default=10, help="keys for each length and depth")
    parser.add_argument("--ratios", nargs="+", type=int, default=RATIOS, help="lengths in windows")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--readme", action="store_true", help="only write the recorded table into the README"
    )
    chosen = parser.parse_args(arguments)
    if chosen.readme:
        text = README.read_text()
        README.write_text(text.partition(BEGIN)[0] + tables() + text.partition(END)[2])
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        texts = list(StdlibSource(max_bytes=TEXT_BYTES).load(Path(cache))["text"])
    shipped = load_passkey_model(SHIPPED)
    unseen = shipped.tokenizer(texts[::HELD_OUT], verbose=False)["input_ids"]
    lengths = [ratio * WINDOW for ratio in sorted(set(chosen.ratios))]
    table = passkey_retrieval(
        shipped.model,
        PasskeyFormat.of(shipped.tokenizer),
        [np.array(ids) for ids in unseen if ids],
        lengths,
        [Extension(method, WINDOW) for method in chosen.methods],
        max_tokens=lengths[-1],
        depths=DEPTHS,
        keys_per_cell=chosen.keys,
        name="the shipped model",
    )
    table.save(chosen.output)
    print(table)


def tables() -> str:
    """Returns the table of the recorded run as Markdown, between the marks of the README."""
    record: dict[str, Any] = json.loads(RESULTS.read_text())
    cells: dict[str, dict[int, list[tuple[int, int]]]] = {}
    for row in record["rows"]:
        by_length = cells.setdefault(row["method"], {})
        by_length.setdefault(row["length"], []).append((row["found"], row["keys"]))
    lengths = list(next(iter(cells.values())))
    lines = [f"| | {' | '.join(f'{length:,} tokens' for length in lengths)} |"]
    lines.append(f"|{'---|' * (len(lengths) + 1)}")
    for method, by_length in cells.items():
        found = [_share(by_length[length]) for length in lengths]
        lines.append(f"| `{method}` | {' | '.join(found)} |")
    return "\n".join([BEGIN, "", *lines, "", END])


def _share(cells: Sequence[tuple[int, int]]) -> str:
    """Returns the share of keys found at all depths of a length."""
    found, keys = map(sum, zip(*cells, strict=True))
    return f"{found / keys:.0%} of {keys}"


if __name__ == "__main__":
    with messages(PROGRAM):
        main()
