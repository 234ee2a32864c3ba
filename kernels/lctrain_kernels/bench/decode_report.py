"""Makes the Markdown table of decode attention from a record in results/decode/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lctrain_kernels.bench.newest import origin

TITLES = {
    "lctrain": "lctrain",
    "lctrain_own_pages": "lctrain, prefix copied",
    "lctrain_same_pages": "lctrain, prefix read by each",
    "lctrain_shared": "lctrain, prefix read once",
    "sdpa": "PyTorch SDPA, `enable_gqa`",
    "sdpa_repeated": "PyTorch SDPA, keys and values repeated",
    "fa4": "FlashAttention-4",
    "flashinfer": "FlashInfer",
}


def decode_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table of times and bandwidths, with a row per case and layout.

    Args:
        record: Record that `lctrain-bench decode` wrote.
    """
    results = [
        result
        for result in record["results"]
        if "error" not in result and result["contender"] in TITLES
    ]
    several = len({result["config"] for result in results if "config" in result}) > 1
    found = {
        (result["case"], result["layout"], _title(result, several)): result for result in results
    }
    ordered = sorted(results, key=lambda result: list(TITLES).index(result["contender"]))
    titles = list(dict.fromkeys(_title(result, several) for result in ordered))
    copies = max(record["copy_bytes_per_s"].values())
    lines = [
        origin(record),
        "",
        "One query per request, replay of a CUDA graph, caches outside L2: microseconds, and in "
        f"brackets TB/s of keys and values. Copies move {copies / 1e12:.2f} TB/s."
        + _notes(results, several),
        "",
        f"| requests x cached tokens | cache | {' | '.join(titles)} |",
        "|---|---|" + "---|" * len(titles),
    ]
    for case, layout in dict.fromkeys(place[:2] for place in found):
        cells = [_cell(found.get((case, layout, title))) for title in titles]
        lines.append(f"| {case} | {layout} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _title(result: Mapping[str, Any], several: bool) -> str:
    title = TITLES[result["contender"]]
    return f"{title} `{result['config']}`" if several and "config" in result else title


def _notes(results: Sequence[Mapping[str, Any]], several: bool) -> str:
    """Returns the sentences that the columns of these results need."""
    text = ""
    if several:
        text += (
            " Configurations are rows x keys:warps:stages:split size:programs per multiprocessor"
            "[:limit of registers:splits that the merge loads together:1 for page numbers loaded "
            "a tile ahead]."
        )
    if any("speedup" in result for result in results):
        text += (
            " A prefix that is read once counts once in TB/s; its last figure is the speed-up over "
            "pages of its own for every request."
        )
    return text


def _cell(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "-"
    text = f"{result['microseconds']:,.1f} ({result['bytes_per_s'] / 1e12:.2f})"
    return text + (f", {result['speedup']:.1f}x" if "speedup" in result else "")
