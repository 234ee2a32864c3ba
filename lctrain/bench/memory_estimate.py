"""Estimates a step from runs with two numbers of layers, or from the part of it that has run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

from lctrain.config import MemoryConfig
from lctrain_kernels.bench.__main__ import positive

ATTENTION_COUNTS = ("keep_attention", "host_attention", "reuse_attention")
"""Settings of memory that count layers; in an estimate they hold for all layers or for none."""
ESTIMATED = ("estimated_from", "step_ms", "tokens_per_s")
"""Figures that `estimate_rest` adds to a run."""
_COMPUTED_AGAIN = ("recompute", "rebuilt")
_GIB = ("peak_gib", "reserved_gib", "host_gib")


def with_fewer(config: MemoryConfig, layers: int) -> MemoryConfig:
    """Returns the settings for a model with fewer layers, which no count exceeds."""
    names = (*ATTENTION_COUNTS, "keep_inputs")
    counts: dict[str, Any] = {}
    for name in names:
        count = getattr(config, name)
        counts[name] = None if count is None else min(count, layers)
    return replace(config, **counts)


def extrapolate(
    measured: Mapping[int, Mapping[str, Any]], layers: int, tokens: int, *, with_memory: bool = True
) -> dict[str, Any]:
    """Returns estimated figures of a model, on the straight line through two measured runs.

    The time and the memory of a step are a constant (embeddings, loss, optimizer) plus a part for
    each layer. All layers must have the same policy.

    Args:
        measured: Figures of a run by its number of layers; two numbers.
        layers: Number of layers of the model.
        tokens: Number of tokens of the pack.
        with_memory: Whether each further layer takes the same memory, which is estimated then too.

    Returns:
        step_ms (one number), tokens_per_s and the bytes in GiB; `estimated_from`, the two numbers
        of layers; and `measured`, the figures of both. If a run has failed, only its status and
        reason.
    """
    (few, first), (more, second) = sorted(measured.items())
    for found in (first, second):
        if found["status"] != "ok":
            return dict(found)

    def line(one: float, other: float) -> float:
        return other + (other - one) / (more - few) * (layers - more)

    sizes = [name for name in _GIB if with_memory and name in second]
    step_ms = line(median(first["step_ms"]), median(second["step_ms"]))
    return {
        "status": "ok",
        "estimated_from": [few, more],
        "step_ms": [round(step_ms, 1)],
        "tokens_per_s": round(1000 * tokens / step_ms, 1),
        **{name: round(line(first[name], second[name]), 3) for name in sizes},
        "measured": [dict(first), dict(second)],
    }


def estimate_rest(run: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Returns the estimated time of a whole step from the part of it that has run.

    The layers whose backward has ended tell the time of a layer's backward. Each layer that is
    left takes as long. Where more of these compute their attention again, the time of a layer's
    forward is added for each, so the estimate is rather too long. The optimizer's step is left out.

    Args:
        run: A run of a record with `layers`, the kept inputs and attention of each layer, and
            `progress`, what `LayerProgress` has reported so far.
        tokens: Number of tokens of the pack.

    Returns:
        `estimated_from`, the layer that the backward had reached; step_ms (one number) and
        tokens_per_s. Empty before the first layer has ended its backward.
    """
    again = [kept.split("/")[1] in _COMPUTED_AGAIN for kept in run.get("layers", ())]
    forward = [at for phase, _, at in run["progress"] if phase == "forward"]
    backward = [(layer, at) for phase, layer, at in run["progress"] if phase == "backward"]
    if not backward or not again or len(forward) != len(again):
        return {}
    ended, until, lowest = len(again), backward[0][1], backward[0][0]
    for layer, at in backward[1:]:
        if layer < lowest:  # the layers from `lowest` on have ended
            ended, until, lowest = lowest, at, layer
    done = len(again) - ended
    if not done:
        return {}
    layer_s = median(second - first for first, second in pairwise(forward))
    backward_s = (until - backward[0][1]) / done
    more = sum(again[:ended]) - ended * sum(again[ended:]) / done
    step_s = until + ended * backward_s + max(0.0, more) * layer_s
    return {
        "estimated_from": lowest,
        "step_ms": [round(1000 * step_s, 1)],
        "tokens_per_s": round(tokens / step_s, 1),
    }


def joined(rounds: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Returns the figures of several rounds of one setting as those of one run.

    Args:
        rounds: Figures of each round, in order.
        tokens: Number of tokens of the pack.
    """
    failed = [found for found in rounds if found["status"] != "ok"]
    if failed:
        return failed[0]
    steps = [milliseconds for found in rounds for milliseconds in found["step_ms"]]
    largest = {name: max(one[name] for one in rounds) for name in _GIB if name in rounds[0]}
    speed = round(1000 * tokens / median(steps), 1)
    return {**rounds[-1], **largest, "step_ms": steps, "tokens_per_s": speed}


def two_numbers(text: str) -> tuple[int, int]:
    """Returns two rising positive numbers from text such as "2,4".

    Raises:
        argparse.ArgumentTypeError: if the text is anything else.
    """
    try:
        few, more = (positive(part) for part in text.split(","))
    except ValueError:
        few = more = 0
    if few >= more:
        raise argparse.ArgumentTypeError(f"must be two rising numbers, such as 2,4, got {text!r}")
    return few, more


def refusal(options: argparse.Namespace, layers: int, is_ours: bool) -> str | None:
    """Returns why a model cannot be estimated with the given options; None if it can.

    Args:
        options: Options of `lctrain-bench memory`, with estimate_layers.
        layers: Number of layers of the model.
        is_ours: Whether lctrain is measured, and so has memory policies of its own.
    """
    few, more = options.estimate_layers
    segment = options.segment_layers
    if more >= layers:
        return f"--estimate-layers must be below the model's {layers} layers, got {more}. Lower it."
    if few % segment or more % segment:
        return (
            f"--estimate-layers must be multiples of --segment-layers ({segment}), got {few},{more}"
            ": a cut segment has another cost. Choose other numbers."
        )
    for name in ATTENTION_COUNTS:
        if (found := getattr(options, name)) not in (0, layers):
            return (
                f"--{name.replace('_', '-')} must be 0 or {layers} with --estimate-layers, got "
                f"{found}: all layers must have the same policy."
            )
    if is_ours and "auto" in options.policies:
        return (
            "--policies must be none, checkpoint or offload with --estimate-layers, got auto, "
            "which may give layers different policies."
        )
    return None
