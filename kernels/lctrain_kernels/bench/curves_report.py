"""Makes the Markdown table of loss curves from the newest record in results/curves/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def curves_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table of the final losses with and without each feature.

    Beside the difference, the table gives the spread of the loss over seeds.

    Args:
        record: Record that `lctrain-bench curves` wrote.
    """
    settings, found = record["settings"], record["comparison"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n".join(
        [
            f"One {record['device']}, {record['date'][:10]}: {settings['shape']}, "
            f"{settings['steps']} steps of {settings['tokens']:,} tokens, {settings['seeds']} "
            f"seeds, {settings['precision']}; {versions}.",
            "",
            "| last loss, everything off | on | on - off | spread of the seeds |",
            "|---|---|---|---|",
            f"| {found['final_loss_off']:.3f} | {found['final_loss_on']:.3f} "
            f"| {found['difference']:.3f} | {found['spread']:.3f} |",
            "",
        ]
    )
