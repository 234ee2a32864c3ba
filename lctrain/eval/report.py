"""write_report: the results of an evaluation on one HTML page that needs no network."""

from __future__ import annotations

import base64
import datetime
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --muted: #616e7c; --line: #e4e7eb; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --muted: #9aa5b1; --line: #3e4c59; --page: #1f2933; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
p.note, caption, th { color: var(--muted); }
img { max-width: 100%; background: #fff; border-radius: 4px; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { text-align: right; padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
pre { white-space: pre-wrap; font-size: 12px; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: Heading.
        text: The result in text.
        rows: Rows with the same keys.
        picture: PNG file; None for no picture.
    """

    title: str
    text: str
    rows: Sequence[Mapping[str, Any]]
    picture: Path | None = None


def write_report(
    path: Path, title: str, sections: Sequence[Section], settings: Mapping[str, Any]
) -> Path:
    """Writes the page, with its pictures and its style inside.

    Args:
        path: HTML file to write.
        title: Title of the page.
        sections: Results.
        settings: Settings, shown at the end.

    Returns:
        The path.
    """
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    shown = html.escape(title)
    body = [f"<h1>{shown}</h1>", f'<p class="note">Written on {now}.</p>']
    for section in sections:
        body.append(f"<section><h2>{html.escape(section.title)}</h2>")
        if section.picture is not None:
            data = base64.b64encode(section.picture.read_bytes()).decode()
            alt = html.escape(section.title)
            body.append(f'<img alt="{alt}" src="data:image/png;base64,{data}">')
        body += [f"<pre>{html.escape(section.text)}</pre>", _table(section.rows), "</section>"]
    lines = "\n".join(f"{key} = {value}" for key, value in settings.items())
    body.append(f"<h2>Settings</h2><pre>{html.escape(lines)}</pre>")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{shown}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        + "\n".join(body)
        + "</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")
    return path


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as a table, without columns that are empty everywhere."""
    kept = [key for key in rows[0] if any(row[key] not in ("", None) for row in rows)]
    head = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in kept)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{html.escape(_shown(row[key]))}</td>" for key in kept)
        lines.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody>'
        "</table></div>"
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "-"
    return f"{value:,.1f}" if 1000 <= abs(value) < 1e12 else f"{value:,.4g}"
