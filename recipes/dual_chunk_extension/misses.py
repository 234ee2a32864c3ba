"""Says which passkeys a method misses beyond the window, and whether chance explains them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lctrain.eval.interval import share_interval
from lctrain.pluralize import pluralize

AIM = 0.9  # share of keys that the best method should find

Row = Mapping[str, str]


def misses(rows: Sequence[Row], method: str, length: int, window: int) -> list[str]:
    """Returns a table of the keys that a method finds by depth, and sentences about the misses.

    Args:
        rows: Rows of passkey_retrieval.csv.
        method: Name of the method.
        length: Length in tokens that the sentences are about.
        window: Trained window in tokens.
    """
    cells = {
        (int(row["length"]), float(row["depth"])): (int(row["found"]), int(row["keys"]))
        for row in rows
        if row["method"] == method
    }
    return [_table(cells, method, window), _sentences(cells, method, length, window)]


Cells = Mapping[tuple[int, float], tuple[int, int]]


def _table(cells: Cells, method: str, window: int) -> str:
    lengths = sorted({length for length, _ in cells})
    depths = sorted({depth for _, depth in cells})
    return "\n".join(
        [
            f"**Keys that {method} finds**, by depth (0 is the beginning of the text):",
            "",
            f"| windows | {' | '.join(f'depth {depth}' for depth in depths)} |",
            f"|{'---|' * (len(depths) + 1)}",
            *(
                f"| {length // window} | "
                + " | ".join("{} of {}".format(*cells[length, depth]) for depth in depths)
                + " |"
                for length in lengths
            ),
        ]
    )


def _sentences(cells: Cells, method: str, length: int, window: int) -> str:
    here = {depth: cell for (tokens, depth), cell in sorted(cells.items()) if tokens == length}
    found, keys = map(sum, zip(*here.values(), strict=True))
    low, high = share_interval(found / keys, keys)
    said = [
        f"At {length // window} windows {method} finds {found} of {keys} keys, {found / keys:.0%}. "
        f"The 95 % interval (Wilson, keys as independent draws) is {low:.0%} to {high:.0%}."
    ]
    if found < AIM * keys:
        chance = at_most(found, keys, AIM)
        likely = f"{chance:.2f}" if chance >= 0.005 else "below 0.005"
        said.append(
            f"A method that finds {AIM:.0%} of all keys finds at most {found} of {keys} with "
            f"probability {likely}, so sampling alone {'may' if chance > 0.05 else 'does not'} "
            f"explain the distance to {AIM:.0%}."
        )
    first = [cell for (tokens, _), cell in cells.items() if tokens == window]
    said.append(f"At one window it finds {sum(f for f, _ in first)} of {sum(k for _, k in first)}.")
    whole = [depth for depth, (f, k) in here.items() if f == k]
    missed = {depth: k - f for depth, (f, k) in here.items() if f < k}
    if missed and whole:
        clean = sum(here[depth][1] for depth in whole)
        lost = keys - found
        uneven = math.comb(keys - clean, lost) / math.comb(keys, lost)
        uneven *= math.comb(len(here), len(whole))  # which depths are whole is seen afterwards
        places = ", ".join(
            f"{count} at depth {depth} ({round((1 - depth) * length):,} tokens before the question)"
            for depth, count in missed.items()
        )
        said.append(
            f"The {lost} misses lie at {len(missed)} of {len(here)} depths: {places}. If every key "
            "were missed with the same probability, they would leave any "
            f"{pluralize(len(whole), 'depth')} whole with a probability of at most "
            f"{min(uneven, 1):.1e}."
        )
    return " ".join(said)


def at_most(found: int, keys: int, share: float) -> float:
    """Returns the binomial probability to find at most `found` of `keys` keys.

    Args:
        found: Number of keys.
        keys: Number of all keys.
        share: Probability to find one.
    """
    return sum(math.comb(keys, n) * share**n * (1 - share) ** (keys - n) for n in range(found + 1))
