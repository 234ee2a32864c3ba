"""Makes the Markdown table of encoders on padded rows from a record in results/encoder/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lctrain_kernels.bench.newest import origin

TITLES = {
    "lctrain": "lctrain",
    "sdpa": "transformers, SDPA",
    "fa4": "transformers, FlashAttention-4, padding removed in each layer",
}


def encoder_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table of times and memory, and lctrain's speed over that of each peer.

    Args:
        record: Record that `lctrain-bench encoder` wrote.
    """
    found = {(result["workload"], result["peer"]): result for result in record["results"]}
    names = [name for name in TITLES if any(peer == name for _, peer in found)]
    lines = [
        origin(record),
        "",
        f"Forward and backward in {record['settings']['dtype']}, milliseconds with the host's "
        "time, and in brackets peak memory in GiB. The ratios are lctrain's speed over that of "
        "each peer, in the same order:",
        "",
        f"| model | rows | {' | '.join(TITLES[name] for name in names)} | ratios |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for workload, case in record["workloads"].items():
        results = [found.get((workload, name)) for name in names]
        graph = ", CUDA graph" if case["graph"] else ""
        note = f"; {case['note']}" if "note" in case else ""
        tokens = f"{case['tokens_of_rows']:,} tokens{graph}{note}"
        rows = f"{case['rows']} of {case['tokens']:,}, {tokens}"
        layers = case.get("layers")
        model = case["model_type"] + ("" if layers is None else f", {layers} layers")
        cells = [model, rows, *(_cell(result) for result in results)]
        ratios = [_ratio(results[0], result) for result in results[1:]]
        lines.append(f"| {' | '.join(cells)} | {', '.join(ratios)} |")
    return "\n".join([*lines, ""])


def _cell(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "-"
    if result["status"] != "ok":
        return str(result["status"]).replace("_", " ")
    memory = result["peak_bytes"]
    return f"{result['step_ms']:.1f}" + ("" if memory is None else f" ({memory / 2**30:.1f})")


def _ratio(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> str:
    mine, other = ((result or {}).get("step_ms") for result in (ours, theirs))
    if mine is None or other is None:
        return "-"
    return f"{other / mine:.2f}"
