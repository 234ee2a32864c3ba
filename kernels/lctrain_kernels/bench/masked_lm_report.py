"""Makes the Markdown table of a masked language model's perplexity by context length.

A record in results/masked_lm/ has device, date, versions and arguments of a run of `lctrain-train`
with task=mlm, and the fields of its report.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lctrain_kernels.bench.newest import origin


def masked_lm_table(record: Mapping[str, Any]) -> str:
    """Returns the losses of a run, and its perplexity by length as a Markdown table.

    Args:
        record: Record of a run.
    """
    lines = [
        origin(record),
        "",
        f"`lctrain-train {' '.join(record['arguments'])}`: {record['steps']:,} steps. The held-out "
        f"loss of masked tokens goes from {record['held_out_first']:.2f} to "
        f"{record['held_out_last']:.2f}.",
        "",
        "| tokens of context | perplexity of masked tokens |",
        "|---|---|",
        *(f"| {length:,} | {perplexity:,.1f} |" for length, perplexity in record["perplexities"]),
        "",
        f"Context: {record['findings']['context']}.",
    ]
    return "\n".join([*lines, ""])
