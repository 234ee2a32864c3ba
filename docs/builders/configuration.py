"""Builds the configuration reference: a table of keys for every schema."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

PAGE = "reference/configuration.md"
HEAD = """# Configuration

Keys of `lctrain-train` and `lctrain-eval`, by group and choice. `group=choice` selects a choice,
`group.key=value` sets a key. This page is generated from the schemas in `lctrain/config/`.
"""


def configuration_page() -> str:
    """Returns the reference as Markdown: a table for every schema."""
    from lctrain.schemas import SCHEMAS

    parts = [HEAD]
    for name in sorted(SCHEMAS, key=lambda name: ("/" in name, name)):
        parts.append(schema_table(name, SCHEMAS[name]))
    return "\n".join(parts)


def schema_table(name: str, schema: type) -> str:
    """Returns the keys of one schema with type, default and meaning."""
    from lctrain.help import attribute_docs

    meanings = attribute_docs(schema)
    group, _, choice = name.rpartition("/")
    title = f"`{group}`: {choice}" if group else f"`{choice}`"
    summary = (schema.__doc__ or "").strip().splitlines()[0]
    lines = [
        f"## {title}",
        "",
        summary,
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for field in fields(schema):
        if field.name == "_target_" and field.name not in meanings:
            continue
        kind = str(field.type).replace("|", "or")
        meaning = meanings.get(field.name, "").replace("|", "\\|")
        lines.append(f"| `{field.name}` | {kind} | {default_of(field)} | {meaning} |")
    return "\n".join([*lines, ""])


def default_of(field: Field[Any]) -> str:
    """Returns the default of a key as a command writes it; "required" where there is none."""
    if field.default_factory is not MISSING:
        return f"`{field.default_factory()!r}`"
    if field.default is MISSING or field.default == "???":
        return "required"
    return "`null`" if field.default is None else f"`{field.default}`"
