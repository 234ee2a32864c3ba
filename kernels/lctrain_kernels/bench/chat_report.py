"""Makes the Markdown table of tokenizing conversations from a record in results/chat/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lctrain_kernels.bench.newest import origin

TITLES = {
    "text": "the rendered text, without masks",
    "conversations": "conversations: rendered, tokenized and masked",
}


def chat_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table of the time of both ways, and the ratio of their times.

    Args:
        record: Record that `lctrain-bench chat` wrote.
    """
    parts = record["parts"]
    total = {
        name: {key: sum(part[name][key] for part in parts) for key in parts[0][name]}
        for name in TITLES
    }
    count = sum(part["conversations_read"] for part in parts)
    trained = sum(part["trained_tokens"] for part in parts)
    tokens = total["conversations"]["tokens"]
    text, chat = total["text"], total["conversations"]
    lines = [
        origin(record),
        "",
        f"{count:,} conversations of {tokens / count:,.0f} tokens on average, of which "
        f"{trained / tokens:.0%} are trained on, with {record['tokenizer']}; no cache of tokens "
        f"exists. Both ways take turns, in {len(parts)} parts:",
        "",
        "| what is tokenized | seconds | CPU seconds | tokens per second |",
        "|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        found = total[name]
        cells = [f"{found[key]:,.1f}" for key in ("seconds", "cpu_seconds")]
        lines.append(
            f"| {title} | {' | '.join(cells)} | {found['tokens'] / found['seconds']:,.0f} |"
        )
    ratios = [chat[key] / text[key] for key in ("seconds", "cpu_seconds")]
    lines.append(f"| ratio | {ratios[0]:.2f} | {ratios[1]:.2f} | |")
    return "\n".join([*lines, ""])
