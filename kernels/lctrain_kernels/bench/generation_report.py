"""Makes the Markdown table of generation from the newest record in results/generation/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lctrain_kernels.bench.newest import origin

TITLES = {
    "graphs": "`lctrain.generate`, CUDA graphs",
    "sampled": "the same, temperature and top-p",
    "waiting": "the same, greedy, the host waits for every token",
    "eager": "`lctrain.generate`, no graphs",
    "invariant": "`lctrain.generate`, CUDA graphs, `batch_invariant=True`",
    "padded": "transformers' `generate`, a padded batch, SDPA",
    "generate_batch": "transformers' `generate_batch`, SDPA",
}


def generation_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table of tokens per second, with a row per case and contender.

    Args:
        record: Record that `lctrain-bench generation` wrote.
    """
    lines = [
        origin(record),
        "",
        "Greedy completions of random prompts. The floor is the time to read weights, keys and "
        f"values of all decode steps at {record['bandwidth'] / 1e12:.1f} TB/s; its share of the "
        "whole time and, in brackets, of the time without prefills. A star marks a time that is "
        "projected from fewer tokens with the median step.",
    ]
    for case in record["cases"].values():
        title = f"{case['shape']}, requests: {case['requests']}, prompts of up to "
        title += f"{case['longest_prompt']:,} tokens, {case['new_tokens']:,} new tokens each"
        lines += [
            "",
            f"{title}:",
            "",
            "| contender | prefill, s | step, ms | tokens/s | share of the floor |",
            "|---|---|---|---|---|",
        ]
        for name, result in case["results"].items():
            if "error" in result:
                status = "not run" if result["error"].startswith("not run") else "error"
                lines.append(f"| {TITLES[name]} | {status} | - | - | - |")
                continue
            star = "" if result["new_tokens"] == case["new_tokens"] else "*"
            lines.append(
                f"| {TITLES[name]} | {result['prefill_seconds']:.2f} | {result['step_ms']:.2f} "
                f"| {result['tokens_per_s']:,.0f}{star} "
                f"| {result['share_of_floor']:.2f} ({result['decode_share']:.2f}) |"
            )
        if "prefill_floor_seconds" in case:
            floors = case["floor_seconds"] + case["prefill_floor_seconds"]
            shares = [
                f"{TITLES[name]}: {result['share_of_floors']:.2f}"
                for name, result in case["results"].items()
                if "share_of_floors" in result
            ]
            lines += [
                "",
                f"The products of the prefills take at least {case['prefill_floor_seconds']:.2f} s "
                f"at {record['flops'] / 1e12:,.0f} TFLOP/s. Share of both floors, "
                f"{floors:.2f} s, in the whole time: {'; '.join(shares)}.",
            ]
        if difference := case.get("log_prob_difference"):
            lines += [
                "",
                f"Log-probabilities of {difference['tokens']:,} generated tokens differ from those "
                f"of a packed training forward by {difference['mean']:.1e} nats on average, and by "
                f"{difference['largest']:.1e} at most.",
            ]
        if invariant := case.get("batch_invariant"):
            difference = invariant["log_prob_difference"]
            ratio = invariant["forward_seconds"] / case["forward_seconds"]
            lines += [
                "",
                f"With `batch_invariant=True`, {difference['tokens']:,} of them differ by "
                f"{difference['mean']:.1e} nats on average, and by {difference['largest']:.1e} at "
                f"most. The training forward of these completions takes {ratio:.2f} times as long.",
            ]
    return "\n".join([*lines, ""])
