"""Makes the Markdown tables of generation from the records in results/generation/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lctrain_kernels.bench.newest import origin

TITLES = {
    "graphs": "`lctrain.generate`, CUDA graphs",
    "sampled": "`lctrain.generate`, CUDA graphs, temperature and top-p",
    "waiting": "`lctrain.generate`, CUDA graphs, the host waits for every token",
    "eager": "`lctrain.generate`, no graphs",
    "invariant": "`lctrain.generate`, CUDA graphs, `batch_invariant=True`",
    "padded": "transformers' `generate`, a padded batch, SDPA",
    "generate_batch": "transformers' `generate_batch`, SDPA",
    "beams_paged": "transformers' `generate`, 4 beams, patched, `PagedCache`",
    "beams_dynamic": "transformers' `generate`, 4 beams, patched, `DynamicCache`",
}


_COMPARISONS = ("log_prob_difference", "batch_invariant")
_SIZES = ("shape", "requests", "prompt_tokens", "longest_prompt", "new_tokens")


def generation_tables(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the tables of all records, the newest first, each time from the newest that has it.

    Args:
        records: Records that `lctrain-bench generation` wrote, in the order of their dates.
    """
    best: dict[tuple[Any, ...], tuple[bool, int]] = {}
    for index, record in enumerate(records):
        for case in record["cases"].values():
            for key, measured in _measured(case).items():
                best[key] = max(best.get(key, (False, index)), (measured, index))
    tables = []
    for index, record in enumerate(records):
        cases = {}
        for name, case in record["cases"].items():
            dropped = {key[-1] for key in _measured(case) if best[key][1] != index}
            results = {key: of for key, of in case["results"].items() if key not in dropped}
            if results:
                kept = {key: value for key, value in case.items() if key not in dropped}
                cases[name] = {**kept, "results": results}
        if cases:
            tables.append(generation_table({**record, "cases": cases}))
    return "\n".join(reversed(tables))


def _measured(case: Mapping[str, Any]) -> dict[tuple[Any, ...], bool]:
    """Returns whether a case has a time, by its sizes and contender, or a comparison."""
    sizes = tuple(case[size] for size in _SIZES)
    found = {(*sizes, name): "error" not in result for name, result in case["results"].items()}
    return found | {(*sizes, name): True for name in _COMPARISONS if name in case}


def generation_table(record: Mapping[str, Any]) -> str:
    """Returns a Markdown table of tokens per second, with a row per case and contender.

    Args:
        record: Record that `lctrain-bench generation` wrote.
    """
    lines = [
        origin(record),
        "",
        "Completions of random prompts, greedy unless the row names temperature or beams. The "
        "floor is the time to read weights, keys and values of all decode steps at "
        f"{record['bandwidth'] / 1e12:.1f} TB/s; its share of the "
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
        if memory := _memory(case["results"]):
            lines += ["", memory]
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


def _memory(results: Mapping[str, Any]) -> str:
    """Returns a sentence on the memory of beam searches; nothing without one."""
    found = [
        f"{TITLES[name]}: {result['peak_bytes'] / 2**30:.1f} GiB"
        for name, result in results.items()
        if name.startswith("beams") and "peak_bytes" in result
    ]
    return f"Most memory that torch had allocated: {'; '.join(found)}." if found else ""
