"""Makes the Markdown table of detached log-sum-exps from a record in results/detached/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lctrain_kernels.bench.newest import origin

TITLES = {"differentiable": "with its gradient, as in lctrain", "detached": "detached"}


def detached_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table of relative errors against float64.

    Args:
        record: Record that `lctrain-bench detached` wrote.
    """
    lines = [
        origin(record),
        "",
        f"A prompt of {record['prompt']} tokens and {record['completions']} completions of "
        f"{record['length']}, in float32: relative error against float64 attention over separate "
        "documents, in norm:",
        "",
        "| log-sum-exp | standard deviation of the logits | output | dq | dk | dv |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        for deviation, errors in record["errors"].items():
            cells = [str(deviation), *(_cell(value) for value in errors[name].values())]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(error: float) -> str:
    return f"{error:.0%}" if error >= 0.01 else f"{error:.0e}"
