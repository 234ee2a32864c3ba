"""Prints the tables of the README: `python -m lctrain.recipes.post_training.table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
BEGIN = "<!-- post_training tables: begin -->"
END = "<!-- post_training tables: end -->"


def tables() -> str:
    """Returns the tables of the recorded runs as Markdown, between the marks of the README."""
    parts = [_sft(record) for record in records("sft")]
    for stage in ("dpo", "grpo"):
        parts += [_passkeys(stage, record) for record in records(stage)]
    return "\n\n".join([BEGIN, *parts, END])


def records(stage: str) -> list[dict[str, Any]]:
    """Returns the records of a stage: `<stage>.json`, and `<stage>_<device>.json`.

    Args:
        stage: "sft", "dpo" or "grpo".
    """
    paths = sorted(RESULTS.glob(f"{stage}*.json"), key=lambda path: path.stem)
    return [json.loads(path.read_text()) for path in paths]


def _sft(record: dict[str, Any]) -> str:
    before, after = record["held_out_loss"]
    right = record["right"]
    lines = [
        f"SFT, on {record['device']}, torch {record['torch']}: {record['steps']} steps in "
        f"{record['seconds']:.0f} s.",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| loss of held-out answers | {before:.3f} | {after:.3f} |",
        f"| right answers of {record['answers']} | {right[0]} | {right[1]} |",
    ]
    return "\n".join(lines)


def _passkeys(stage: str, record: dict[str, Any]) -> str:
    ranked = stage == "dpo"
    title = (
        "trained pairs ranked correctly, first and last ten packs"
        if ranked
        else "mean reward, first and second half"
    )
    lines = [
        f"{stage.upper()}, on {record['device']}, torch {record['torch']}, documents of "
        f"{record['length']} tokens:",
        "",
        f"| seed | steps | held-out keys found | points | {title} | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for run in record["runs"]:
        before, after = run["accuracy"]
        first, last = run["pairs_ranked_correctly" if ranked else "mean_reward_by_half"]
        pair = f"{first:.0%} to {last:.0%}" if ranked else f"{first:.2f}, {last:.2f}"
        lines.append(
            f"| {run['seed']} | {run['steps']} | {before:.1%} to {after:.1%} of "
            f"{run['held_out_keys']} | {100 * (after - before):+.1f} | {pair} | "
            f"{run['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Writes the tables into the README."""
    text = README.read_text()
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    README.write_text(head + tables() + tail)
    print(tables())


if __name__ == "__main__":
    main()
