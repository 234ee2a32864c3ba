"""Draws the pictures of the architecture as SVG: rows of boxes, with arrows between rows.

`python docs/builders/pictures.py` writes them into docs/pictures. Mermaid is not used, since it
loads its script over the network whenever a page is opened.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "pictures"

BOX_WIDTH, BOX_HEIGHT, GAP, ROW_GAP, MARGIN = 190, 52, 14, 34, 10

# Every row is a list of boxes: (title, second line). Arrows lead from each row to the next one.
PICTURES: dict[str, list[list[tuple[str, str]]]] = {
    "packages": [
        [("lctrain.recipes", "experiments")],
        [("lctrain.train", "lctrain-train"), ("lctrain.evaluate", "lctrain-eval")],
        [("lctrain.callbacks", "each on its own")],
        [("lctrain.module", "LongContextModule"), ("lctrain.eval", "tasks, tables, report")],
        [("lctrain.models", "patches")],
        [
            ("lctrain.attention", "for transformers"),
            ("lctrain.loss", "sum and count"),
            ("lctrain.data", "sources, packing"),
        ],
        [("lctrain.batch", "PackedBatch")],
        [("lctrain_kernels", "a folder per operation")],
        [("lctrain_kernels.gluon", "Hopper helpers")],
        [("lctrain_kernels.tile", "portable helpers")],
    ],
    "batch": [
        [("source", "documents: text")],
        [("tokenizing", "ids [n] int64")],
        [("packing", "rows of at most max_tokens")],
        [("collator", "PackedBatch, on the CPU")],
        [("module", "one copy to the device")],
        [("patched model", "boundaries as arguments")],
        [("attention", "out [T, H, D], lse [H, T]")],
        [("loss", "(sum, number of tokens)")],
    ],
    "data": [
        [("text, jsonl, parquet", "files"), ("hub", "datasets"), ("stdlib, packages", "sources")],
        [("tokenizer", "pretrained, or trained"), ("cache", "Arrow files")],
        [("plan_rows", "best fit decreasing")],
        [("order of rows", "balanced over ranks")],
        [("PackCollator", "validates lengths")],
    ],
    "models": [
        [("patch_model", "checks the architecture")],
        [("input hook", "finds the documents"), ("attention", "AttentionInterface")],
        [("fused=True", "norms, rotary, MLP"), ("loss=True", "no logits")],
        [("PatchHandle", "unpatch() restores")],
    ],
    "training": [
        [("lctrain-train", "Hydra config -> dataclasses"), ("run folder", "locked, checkpoints")],
        [("Trainer", "Lightning")],
        [("LongContextModule", "sum of token losses"), ("callbacks", "each on its own")],
        [("token window", "one division per step"), ("StepCheckpoint", "sealed files")],
    ],
    "evaluation": [
        [("lctrain-eval", "a stored model"), ("LongContextEval", "during training")],
        [("Task", "documents or prompts, scores")],
        [("Reading", "as it is, or a method"), ("Run", "cells, shared by ranks")],
        [("score_windows", "each token once"), ("score_prompts", "answers, or likelihood")],
        [("CellStore", "goes on after a kill")],
        [
            ("tables, plots", "errors over items"),
            ("report.html", "needs no network"),
            ("compare", "paired differences"),
        ],
    ],
    "kernels": [
        [("api.py", "checks, backend")],
        [("operators.py", "torch.library, autograd")],
        [("registry.py", "implementation of a call")],
        [
            ("reference.py", "PyTorch"),
            ("triton_*.py", "portable"),
            ("hopper*.py", "H100, H200"),
        ],
        [("tile/", "device helpers"), ("gluon/", "pipelines, barriers")],
    ],
}


def picture(name: str) -> str:
    """Returns a picture as the text of an SVG file, readable on a light and a dark page."""
    rows = PICTURES[name]
    width = max(len(row) for row in rows) * (BOX_WIDTH + GAP) - GAP + 2 * MARGIN
    height = len(rows) * (BOX_HEIGHT + ROW_GAP) - ROW_GAP + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{name}" '
        'font-family="sans-serif" text-anchor="middle">',
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="#5c6bc0"/></marker>',
    ]
    for index, row in enumerate(rows):
        top = MARGIN + index * (BOX_HEIGHT + ROW_GAP)
        left = (width - len(row) * (BOX_WIDTH + GAP) + GAP) / 2
        for column, (title, detail) in enumerate(row):
            parts.append(_box(left + column * (BOX_WIDTH + GAP), top, title, detail))
        if index + 1 < len(rows):
            start, end = top + BOX_HEIGHT + 2, top + BOX_HEIGHT + ROW_GAP - 3
            parts.append(
                f'<line x1="{width / 2}" y1="{start}" x2="{width / 2}" y2="{end}" '
                'stroke="#5c6bc0" stroke-width="2" marker-end="url(#tip)"/>'
            )
    return "\n".join([*parts, "</svg>", ""])


def _box(left: float, top: float, title: str, detail: str) -> str:
    middle = left + BOX_WIDTH / 2
    first = top + (22 if detail else 31)
    text = f'<text x="{middle}" y="{first}" font-size="15" fill="#1a237e">{escape(title)}</text>'
    if detail:
        text += (
            f'<text x="{middle}" y="{top + 41}" font-size="12.5" fill="#37474f">'
            f"{escape(detail)}</text>"
        )
    return (
        f'<rect x="{left}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" '
        f'fill="#e8eaf6" stroke="#5c6bc0"/>{text}'
    )


def main() -> None:
    """Writes every picture."""
    FOLDER.mkdir(exist_ok=True)
    for name in PICTURES:
        (FOLDER / f"{name}.svg").write_text(picture(name))


if __name__ == "__main__":
    main()
