"""Makes the Markdown table of decode attention from the newest record in results/decode/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lctrain_kernels.bench.newest import origin

TITLES = {
    "lctrain": "lctrain",
    "lctrain_own_pages": "lctrain, prefix copied",
    "lctrain_same_pages": "lctrain, prefix read by each",
    "lctrain_shared": "lctrain, prefix read once",
    "sdpa": "PyTorch SDPA, `enable_gqa`",
    "fa4": "FlashAttention-4",
    "flashinfer": "FlashInfer",
}


def decode_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table of times and bandwidths, with a row per case and layout.

    Args:
        record: Record that `lctrain-bench decode` wrote.
    """
    found = {
        (result["case"], result["layout"], result["contender"]): result
        for result in record["results"]
        if "error" not in result
    }
    names = [name for name in TITLES if any(key[2] == name for key in found)]
    copies = max(record["copy_bytes_per_s"].values())
    lines = [
        origin(record),
        "",
        "One query per request, replay of a CUDA graph, caches outside L2: microseconds, and in "
        f"brackets TB/s of keys and values. Copies move {copies / 1e12:.2f} TB/s.",
        "",
        f"| requests x cached tokens | cache | {' | '.join(TITLES[name] for name in names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for case, layout in dict.fromkeys(key[:2] for key in found):
        cells = []
        for name in names:
            result = found.get((case, layout, name))
            if result is None:
                cells.append("-")
                continue
            cells.append(f"{result['microseconds']:,.1f} ({result['bytes_per_s'] / 1e12:.2f})")
        lines.append(f"| {case} | {layout} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
