"""Compares the variants at the best learning rate of each: which rate, and how far apart they are.

A variant's best rate has the lowest held-out loss, as a mean over seeds. A rate with fewer seeds
than another one is left out. A rate at which a run diverged is the best only if all are such. The
difference from the plain model is paired by seed, since both saw the same batches. Its 95 %
interval is Student's, over the seeds. The losses agree if the whole interval lies within PARITY
nats of zero; they differ if it does not hold zero. Otherwise the seeds are too few to tell.

Where the seeds of the best rate lie far apart, its mean may be the lowest by luck. So the
difference is also taken at every other rate whose mean is within one standard error of the best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lctrain.recipes.differential.comparison import over_seeds
from lctrain_kernels.strict_json import number

PARITY = 0.03
"""Largest difference of held-out losses that counts as none, in nats per token."""
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}
"""97.5 % quantile of Student's distribution by the number of seeds; the last one for more seeds."""


def summarize_rates(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the losses by variant and rate, and the comparison at the best rates.

    Args:
        runs: Records of runs, each with its variant, seed, learning rate and held-out loss.

    Returns:
        `by_rate`: for each variant a list of rates, each with the means over seeds.
        `best`: for each variant its best rate, whether this is the lowest or the highest of all
        rates (so that a better one may lie outside), the difference from the plain model, and
        `as_good`: the other rates within one standard error of the best, with their differences.
    """
    by_rate = {name: _rates(runs, name) for name in dict.fromkeys(run["variant"] for run in runs)}
    found = {name: _best(rates) for name, rates in by_rate.items()}
    best: dict[str, Any] = {}
    for name, row in found.items():
        rates = [other["rate"] for other in by_rate[name]]
        best[name] = {**row, "at_the_edge": row["rate"] in (rates[0], rates[-1])}
        if name != "plain" and "plain" in found:
            best[name]["minus_plain"] = _paired(row, found["plain"])
            best[name]["as_good"] = [
                {**other, "minus_plain": _paired(other, found["plain"])}
                for other in _as_good(row, by_rate[name])
            ]
    return {"by_rate": by_rate, "best": best}


def _rates(runs: Sequence[dict[str, Any]], variant: str) -> list[dict[str, Any]]:
    rows = []
    for rate in sorted({run["learning_rate"] for run in runs if run["variant"] == variant}):
        group = [r for r in runs if r["variant"] == variant and r["learning_rate"] == rate]
        group.sort(key=lambda run: run["seed"])
        rows.append(
            {
                "rate": rate,
                "seeds": [run["seed"] for run in group],
                "held_out_loss": over_seeds([run["held_out_loss"] for run in group]),
                "largest_logit": over_seeds([run["largest_logit"] for run in group]),
            }
        )
    return rows


def _best(rates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    most = max(len(row["seeds"]) for row in rates)
    whole = [row for row in rates if len(row["seeds"]) == most]  # not those of an unfinished sweep
    diverged = math.inf  # a mean of NaN, which is not smaller than any number
    means = [row["held_out_loss"]["mean"] for row in whole]
    order = [mean if math.isfinite(mean) else diverged for mean in means]
    return whole[order.index(min(order))]


def _as_good(best: dict[str, Any], rates: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the other rates with as many seeds, within one standard error of the best mean."""
    loss = best["held_out_loss"]
    error = loss["standard_error"]
    reach = loss["mean"] + (error if error is not None and math.isfinite(error) else 0.0)
    return [
        row
        for row in rates
        if row["rate"] != best["rate"]
        and len(row["seeds"]) == len(best["seeds"])
        and row["held_out_loss"]["mean"] <= reach
    ]


def _paired(row: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Returns the difference from the plain model over the seeds that both have."""
    theirs = dict(zip(plain["seeds"], plain["held_out_loss"]["values"], strict=True))
    ours = dict(zip(row["seeds"], row["held_out_loss"]["values"], strict=True))
    difference = over_seeds([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
    error, count = difference["standard_error"], len(difference["values"])
    if error is None or not math.isfinite(error):
        return {**difference, "interval": None, "verdict": "one seed says nothing"}
    reach = STUDENT[min(count, max(STUDENT))] * error
    low, high = difference["mean"] - reach, difference["mean"] + reach
    return {**difference, "interval": [low, high], "verdict": verdict(low, high)}


def verdict(low: float, high: float) -> str:
    """Returns what the interval of a difference says, in nats per token."""
    if low >= -PARITY and high <= PARITY:
        return "the losses agree"
    if low > 0 or high < 0:
        return "the losses differ"
    return "too few seeds to tell"


def as_markdown(summary: dict[str, Any]) -> str:
    """Returns the two tables of a summary."""
    rates = sorted({row["rate"] for rows in summary["by_rate"].values() for row in rows})
    lines = [f"| held-out loss | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    lines.append(f"|{'---|' * (len(rates) + 1)}")
    for name, rows in summary["by_rate"].items():
        losses = {row["rate"]: with_error(row["held_out_loss"], ".3f") for row in rows}
        lines.append(f"| {name} | {' | '.join(losses.get(rate, '') for rate in rates)} |")
    lines += [
        "",
        "| at its best rate | rate | largest logit | minus plain | 95 % interval | |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in summary["best"].items():
        edge = " (the edge)" if row["at_the_edge"] else ""
        lines.append(_best_row(name, f"{row['rate']:g}{edge}", row))
        for other in row.get("as_good", []):
            lines.append(_best_row(f"{name}, as good", f"{other['rate']:g}", other))
    return "\n".join(lines)


def _best_row(name: str, rate: str, row: dict[str, Any]) -> str:
    cells = [name, rate, with_error(row["largest_logit"], ".0f")]
    difference = row.get("minus_plain")
    if difference is None:
        return f"| {' | '.join(cells)} | | | |"
    ends = difference["interval"]
    interval = "" if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}"
    cells += [f"{number(difference['mean']):+.3f}", interval, difference["verdict"]]
    return f"| {' | '.join(cells)} |"


def with_error(cell: dict[str, Any], form: str) -> str:
    """Returns a mean with its standard error; `nan` if a file holds null for it."""
    error = cell["standard_error"]
    return f"{number(cell['mean']):{form}}" + ("" if error is None else f" ± {error:{form}}")
