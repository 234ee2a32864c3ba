"""Makes the Markdown table of the Hopper backward's forms from results/varlen_backward/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lctrain_kernels.bench.newest import origin

# The forms in use at D = 64 (now, before), 96, 128 (long documents, others) and 256.
LANDED = ("apart", "q128_f1", "d96", "d128_long", "d128_f1", "wide")
# Workloads whose documents have fewer than 4,096 tokens on average, which never use this form.
SHORT, LONG_FORM = ("16x2k", "mix32k", "mix32k_tail"), "d128_long"
BEFORE, PEER = ("base", "portable"), "fa4"


def backward_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table of the backward in use beside the one before and FlashAttention-4.

    Workloads without FlashAttention-4, or without the backward in use, are left out. NOTES.md
    describes the other forms of the record.

    Args:
        record: Record of forms of the backward, in rounds.
    """
    lines = [
        origin(record),
        "",
        "Milliseconds of a backward call, and of its kernels alone. The ratios are "
        "FlashAttention-4's time over lctrain's:",
        "",
        "| workload | round | before | lctrain | FlashAttention-4 | ratio | kernels: lctrain "
        "| FlashAttention-4 | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = dict.fromkeys(name for turn in record["rounds"] for name in turn["workloads"])
    for name in names:
        for turn in record["rounds"]:
            found = turn["workloads"].get(name)
            if found is None or PEER not in found["ms"]:
                continue
            forms = (form for form in LANDED if name not in SHORT or form != LONG_FORM)
            ours = next((form for form in forms if form in found["ms"]), None)
            if ours is None:
                continue
            olds = (found["ms"][form] for form in BEFORE if form in found["ms"])
            before = next((f"{time:.2f}" for time in olds), "-")
            times = [found["ms"][form] for form in (ours, PEER)]
            cells = [f"`{name}`", str(turn["round"]), before, *(f"{time:.2f}" for time in times)]
            cells.append(f"{times[1] / times[0]:.2f}")
            kernels = found.get("kernels_us")
            if kernels is None:
                cells += ["-"] * 3
            else:
                alone = [sum(kernels[form].values()) / 1000 for form in (ours, PEER)]
                cells += [*(f"{time:.2f}" for time in alone), f"{alone[1] / alone[0]:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
