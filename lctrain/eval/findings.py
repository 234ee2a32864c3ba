"""Describes the results of an evaluation in sentences, for the report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lctrain.eval.comparison import MethodComparison
from lctrain.eval.passkey_table import PasskeyTable
from lctrain.eval.table import PerplexityRow
from lctrain.pluralize import pluralize

CLEAR = 3.0  # a difference above this number of standard errors is called clear
NOTABLE = math.log(1.05)  # nats; a smaller gain (below 5 % of the perplexity) is called slight


def context_gain(rows: Sequence[PerplexityRow], window: int | None = None) -> str:
    """Says whether more context lowers the perplexity, within the trained window.

    The losses of the same tokens at the shortest and the longest length are compared. The standard
    error is that of their difference.

    Args:
        rows: Perplexity at each length, by rising length.
        window: Length of the texts that the model was trained on, in tokens. Longer contexts are
            left out; None compares all lengths.

    Returns:
        A sentence; empty if there are fewer than two lengths, or the perplexity is not finite.
    """
    within = [row for row in rows if window is None or row.length <= window]
    if len(within) < 2 or not math.isfinite(within[-1].perplexity):
        return ""
    first, last = within[0], within[-1]
    numbers = (
        f"perplexity {first.perplexity:,.1f} with {first.length:,} tokens of context, "
        f"{last.perplexity:,.1f} with {last.length:,}"
    )
    if last.mean_context == first.mean_context:
        return (
            f"perplexity {first.perplexity:,.1f}; no document has more than {first.length:,} "
            "tokens, so longer contexts add nothing"
        )
    if not last.gain_stderr > 0:
        return f"{numbers} (lower is better)"
    errors = last.gain / last.gain_stderr
    verdict = "no clear change"
    if errors > CLEAR:
        verdict = "context helps" if last.gain > NOTABLE else "slightly lower with more context"
    elif errors < -CLEAR:
        verdict = "context hurts"
    return f"{numbers} (lower is better): {verdict}, {abs(errors):.1f} standard errors"


def beyond_window(comparison: MethodComparison) -> str:
    """Says how the perplexity of each method changes from the trained window to the longest length.

    Returns:
        A sentence. It is empty if all lengths are beyond the window, or all are within it.
    """
    longest = next(iter(comparison.tables.values())).rows[-1].length
    if longest <= comparison.window:
        return ""
    changes = []
    for method, table in comparison.tables.items():
        ratio = comparison.ratio(method, table.rows[-1])
        if math.isnan(ratio):
            return ""
        changes.append(f"{method} {ratio - 1:+.0%}" if ratio < 10 else f"{method} x {ratio:,.0f}")
    return f"perplexity at {_times(longest, comparison.window)}: {', '.join(changes)}"


def keys_found(table: PasskeyTable) -> str:
    """Says how many of the hidden keys each method finds at the longest length."""
    longest = table.lengths[-1]
    hidden = table.keys * len(table.depths)
    found = [f"{method} {int(counts[-1].sum())}" for method, counts in table.found.items()]
    return (
        f"of {pluralize(hidden, 'key')} hidden in texts of {_times(longest, table.window)}, found: "
        f"{', '.join(found)}"
    )


def _times(length: int, window: int) -> str:
    if length <= window:
        return f"{length:,} tokens"
    return f"{length:,} tokens, {length / window:,.3g} times the trained length"
