"""`lctrain-bench balance`: simulates, on a CPU, how evenly attention work is spread over ranks.

    lctrain-bench balance                    # writes a JSON record, prints the table

Documents with log-normal lengths are packed into rows, and the rows are ordered as in a training
run. The work of a row is the sum of its squared document lengths. The reported figure is the work
of the heaviest rank over the mean of all ranks, averaged over the optimizer steps of an epoch; 1 is
perfect.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lctrain.data.order import BALANCE_WINDOW, epoch_order
from lctrain.data.packing import PackingPlan, plan_rows
from lctrain_kernels.bench.__main__ import positive, results_folder
from lctrain_kernels.bench.balance_report import balance_table
from lctrain_kernels.strict_json import write_json

PACKS = (1, 4)


@dataclass(frozen=True)
class Mix:
    """A distribution of document lengths, and the rows that hold the documents.

    Attributes:
        max_tokens: Capacity of a row in tokens.
        sigma: Standard deviation of the natural logarithm of a length in tokens.
        documents: Number of documents.
        mu: Mean of the natural logarithm of a length in tokens.
        shortest: Smallest length in tokens; shorter draws are raised to it.
    """

    max_tokens: int
    sigma: float
    documents: int
    mu: float = 6.5
    shortest: int = 16

    def plan(self, seed: int) -> PackingPlan:
        """Draws the documents and packs them; documents longer than a row are split."""
        lengths = np.random.default_rng(seed).lognormal(self.mu, self.sigma, self.documents)
        return plan_rows(np.maximum(self.shortest, lengths).astype(np.int64), self.max_tokens)


MIXES = (Mix(32_768, 1.0, 100_000), Mix(131_072, 1.5, 200_000))


def spread(order: np.ndarray, costs: np.ndarray, packs: int) -> float:
    """Returns the work of the heaviest rank over the mean, averaged over optimizer steps.

    Args:
        order: Row of every rank at every step, [steps, ranks].
        costs: [R] attention work of every row.
        packs: Number of packs per rank in an optimizer step.
    """
    work = costs[order]
    steps = len(work) // packs
    work = work[: steps * packs].reshape(steps, packs, -1).sum(axis=1)
    return float((work.max(axis=1) / work.mean(axis=1)).mean())


def simulate(mix: Mix, ranks: int, seed: int, window: int = BALANCE_WINDOW) -> dict[str, Any]:
    """Draws, packs and orders documents, and measures the balance of the ranks.

    Args:
        mix: Distribution of document lengths.
        ranks: Number of ranks.
        seed: Seed of the lengths and of the shuffle.
        window: Number of steps within which rows are sorted by work.

    Returns:
        A dictionary: "fill", "rows", "steps", and for each number of packs per rank the result of
        `spread` for a plain shuffle ("as_drawn") and for lctrain's order ("balanced").
    """
    plan = mix.plan(seed)
    costs = plan.costs()
    order = epoch_order(costs, ranks, seed, epoch=0, window=window)
    shuffled = np.random.default_rng(seed).permutation(len(plan))[: order.size].reshape(order.shape)
    return {
        "fill": plan.report.fill,
        "rows": len(plan),
        "steps": len(order),
        "as_drawn": {str(packs): spread(shuffled, costs, packs) for packs in PACKS},
        "balanced": {str(packs): spread(order, costs, packs) for packs in PACKS},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulates every mix, prints the table and writes the record."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench balance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=positive, default=8)
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds, from 0")
    parser.add_argument("--window", type=positive, default=BALANCE_WINDOW)
    parser.add_argument("--tiny", action="store_true", help="a 50th of the documents")
    parser.add_argument("--output", type=Path, help="JSON file; default: results/balance/")
    options = parser.parse_args(arguments)
    output = options.output or results_folder() / "balance" / "balance.json"
    results = []
    for mix in MIXES:
        used = Mix(mix.max_tokens, mix.sigma, mix.documents // (50 if options.tiny else 1))
        for seed in range(options.seeds):
            found = simulate(used, options.ranks, seed, options.window)
            results.append({"mix": asdict(used), "seed": seed, **found})
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "settings": {"ranks": options.ranks, "window": options.window, "seeds": options.seeds},
        "results": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, record, indent=1)
    print(balance_table(record))
    print(f"Wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
