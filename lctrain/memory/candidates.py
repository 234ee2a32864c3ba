"""Turns memory settings into a policy for each layer, and lists the settings that "auto" tries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from lctrain.config import MemoryConfig
from lctrain.config.memory import WITH_HOST
from lctrain.limits import require
from lctrain.memory.arena import aligned
from lctrain.memory.duration import repeated
from lctrain.memory.layers import DEVICE, HOST, REBUILT, RECOMPUTE, LayerPolicy
from lctrain.memory.profile import Profile
from lctrain.pluralize import pluralize

DEFAULT_INPUTS = 2
"""Layers, from the last, whose inputs stay on the device unless memory.keep_inputs is set."""
LONGEST_SEGMENT = 5
"""Most layers of a segment that "auto" tries: rebuilt inputs of a segment are on the device."""
LEAST_BY_HEAD = 65_536
"""Tokens from which "auto" tries backward_by_head.

A key/value head then has 512 tiles of 128 keys, several for every multiprocessor of a GPU.
"""


def fastest(
    config: MemoryConfig,
    measured: Profile,
    host_limit: int | None,
    fits: Callable[[MemoryConfig], bool],
) -> MemoryConfig | None:
    """Returns the settings that compute least among those that fit; None if none fits.

    Each of the `candidates` that fits then reuses the attention of as many rebuilt layers as fit.

    Args:
        config: Settings of "auto".
        measured: Bytes and floating-point operations of a step, from `profile`.
        host_limit: Host memory in bytes that the step may use; None for no limit.
        fits: Function that returns whether the memory suffices for given settings.
    """
    count = len(measured.layers)
    best, least = None, float("inf")
    for bound, candidate in candidates(config, measured, host_limit):
        if bound >= least:
            break
        if not fits(candidate):
            continue
        low, high = 0, count if candidate.segment_layers > 1 and _has_attention(measured) else 0
        while low < high:
            middle = (low + high + 1) // 2
            more = fits(replace(candidate, reuse_attention=middle))
            low, high = (middle, high) if more else (low, middle - 1)
        reused = sum(one.attention == REBUILT for one in _reusing(candidate, count, low))
        found = replace(candidate, reuse_attention=reused)
        cost = sum(repeated(measured, policies_of(found, count)))
        if cost < least:
            best, least = found, cost
    return best


def _has_attention(measured: Profile) -> bool:
    """Returns whether attention can be kept, which is lctrain's: all layers have it, or none."""
    return any(layer.attention for layer in measured.layers)


def _reusing(config: MemoryConfig, count: int, reused: int) -> list[LayerPolicy]:
    """Returns the LayerPolicy of every layer if `reused` rebuilt layers reuse their attention."""
    return policies_of(replace(config, reuse_attention=reused), count)


def candidates(
    config: MemoryConfig, measured: Profile, host_limit: int | None
) -> list[tuple[float, MemoryConfig]]:
    """Returns settings for "auto", none of which reuses the attention of rebuilt layers.

    They are sorted by the fewest operations that the backward computes again if all rebuilt layers
    reuse their attention. Among settings with equal numbers, those that compute all heads at once
    come first, and among these those that move the fewest bytes to the host.

    Args:
        config: Settings of "auto".
        measured: Bytes and floating-point operations of a step, from `profile`.
        host_limit: Host memory in bytes that the step may use; None for no limit.

    Returns:
        (the number of operations, settings) of each.
    """
    count = len(measured.layers)
    layers = count if _has_attention(measured) else 0
    per_input = max(aligned(layer.inputs) for layer in measured.layers)
    on_host = count if host_limit is None else max(host_limit - measured.host, 0) // per_input
    found: list[tuple[float, MemoryConfig]] = []
    by_head = [False]
    if measured.compiled:  # it can trace no other policy
        layers = 0
    elif measured.tokens >= LEAST_BY_HEAD and measured.by_head() != measured:
        by_head.append(True)

    def add(name: str, segment: int, **options: Any) -> None:
        unused = {} if name in WITH_HOST else {"keep_inputs": None, "host_gib": None}
        made = replace(config, name=name, segment_layers=segment, **(unused | options))
        reused = layers if segment > 1 else 0
        cost = sum(repeated(measured, _reusing(made, count, reused)))
        found.extend((cost, replace(made, backward_by_head=one)) for one in by_head)

    longest = 1 if measured.compiled else min(LONGEST_SEGMENT, count)
    for segment in range(1, longest + 1):
        # Inputs of layers that do not fit on the host stay on the device.
        least = max(_kept_inputs(config, count), count - segment * on_host)
        for kept in reversed(range(layers + 1)):
            add("checkpoint", segment, keep_attention=kept)
        if measured.compiled:
            continue
        for kept in reversed(range(layers + 1)):
            for away in range(layers - kept + 1):
                add(
                    "offload",
                    segment,
                    keep_inputs=least,
                    keep_attention=kept,
                    host_attention=away,
                )
        if config.keep_inputs is None:
            add("offload", segment, keep_inputs=max(0, count - segment * on_host))
    found.sort(key=lambda one: (one[0], one[1].backward_by_head))
    if config.mlp_tokens is None:
        found.insert(0, (0.0, replace(config, name="none", keep_inputs=None, host_gib=None)))
    return found


def policies_of(config: MemoryConfig, layers: int) -> list[LayerPolicy]:
    """Returns the LayerPolicy of every layer; an empty list for the policy none.

    Args:
        config: Settings of the policy none, checkpoint or offload.
        layers: Number of layers.

    Raises:
        ValueError: if a setting counts more layers than the model has.
    """
    if config.name == "none":
        return []
    counts = {
        "keep_inputs": config.keep_inputs or 0,
        "segment_layers": config.segment_layers,
        "keep_attention": config.keep_attention,
        "reuse_attention": config.reuse_attention,
        "keep_attention + memory.host_attention": config.keep_attention + config.host_attention,
    }
    for option, count in counts.items():
        require(
            count <= layers,
            f"memory.{option} must be at most the model's {pluralize(layers, 'layer')}, got "
            f"{count}. Lower it.",
        )
    found = []
    kept = _kept_inputs(config, layers)
    for from_last in reversed(range(layers)):
        on_host = config.name == "offload" and from_last >= kept
        attention = RECOMPUTE
        if from_last < config.keep_attention:
            attention = DEVICE
        elif from_last < config.keep_attention + config.host_attention:
            attention = HOST
        place = HOST if on_host else DEVICE
        if (layers - 1 - from_last) % config.segment_layers:
            place = RECOMPUTE
        found.append(LayerPolicy(place, attention))
    twice = [
        index
        for index, (before, policy) in enumerate(pairwise(found))
        if policy.inputs == RECOMPUTE and before.attention == RECOMPUTE
    ]  # layers whose attention the backward would compute in two runs
    for index in twice[: config.reuse_attention]:
        found[index] = replace(found[index], attention=REBUILT)
    return found


def _kept_inputs(config: MemoryConfig, layers: int) -> int:
    """Returns the number of layers whose inputs stay on the GPU under the policy offload."""
    return min(DEFAULT_INPUTS, layers) if config.keep_inputs is None else config.keep_inputs
