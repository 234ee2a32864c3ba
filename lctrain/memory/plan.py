"""plan: predicts the memory of a training step on GPU and host, and chooses a policy that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import nn

from lctrain.config import MemoryConfig
from lctrain.config.memory import WITH_HOST
from lctrain.limits import require
from lctrain.memory.arena import aligned
from lctrain.memory.layers import DEVICE, HOST, RECOMPUTE, LayerPolicy
from lctrain.memory.profile import LayerBytes, Profile, profile
from lctrain.memory.store import MOST_WAITING
from lctrain.pluralize import pluralize

GIB = 2**30
RESERVE = GIB
"""Device bytes for CUDA's context, its libraries and what the allocator cannot use."""
LARGEST = 2**27
"""Most tokens of a pack for which a context length is searched."""
DEFAULT_INPUTS = 2
"""Layers, from the last, whose inputs stay on the device unless memory.keep_inputs is set."""
_STEP = 1024  # tokens; the longest context is given in multiples of it


@dataclass(frozen=True)
class Plan:
    """Predicted memory of one training step (forward, backward, optimizer) under one memory policy.

    Attributes:
        tokens: Number of tokens of the pack.
        policy: Name of the memory policy: none, checkpoint or offload.
        policies: LayerPolicy of every layer; empty for the policy none.
        device_bytes: Peak bytes on the GPU, with weights, gradients and optimizer states.
        host_bytes: Bytes of host memory for tensors that the policy moves there.
        longest: Largest number of tokens that fits with this policy, a multiple of 1024; None if
            the GPU's memory is unknown.
        fits: Whether the step fits into the GPU's and the host's memory; None if that is unknown.
        parts: `device_bytes` by purpose, such as "weights" or "optimizer".
        rows: Bytes of every layer.
        device_limit: Memory of the GPU in bytes; None if unknown.
        host_limit: Bytes that the step may use on the host; None for no limit.
    """

    tokens: int
    policy: str
    policies: tuple[LayerPolicy, ...]
    device_bytes: int
    host_bytes: int
    longest: int | None
    fits: bool | None
    parts: dict[str, int]
    rows: tuple[LayerBytes, ...]
    device_limit: int | None
    host_limit: int | None

    def __str__(self) -> str:
        limit = "" if self.device_limit is None else f" of {self.device_limit / GIB:.1f}"
        room = "" if self.host_limit is None else f" of {self.host_limit / GIB:.1f}"
        lines = [
            f"Memory of a step on {self.tokens:,} tokens: memory={self.policy}",
            f"device {self.device_bytes / GIB:.2f}{limit} GiB, "
            f"host {self.host_bytes / GIB:.2f}{room} GiB",
            *(f"  {name:<34}{size / GIB:>9.2f} GiB" for name, size in self.parts.items()),
            *_layer_lines(self),
        ]
        if self.longest is not None:
            lines.append(f"longest context that fits with these settings: {self.longest:,} tokens")
        return "\n".join([*lines, self.advice()])

    def advice(self) -> str:
        """Returns a sentence: whether the step fits, and if not, which option to change."""
        if self.fits is None:
            return "Set memory.device_gib to compare it with a device."
        if self.fits:
            return "It fits."
        if self.longest:
            shorter = f"lower data.max_tokens to {self.longest}"
        else:
            shorter = "train adapters (adapter=lora), or choose a smaller model"
        more = {
            "none": "set memory=checkpoint",
            "checkpoint": "set memory=offload",
        }.get(self.policy, "raise memory.host_gib")
        has_room = self.host_limit is None or self.host_bytes <= self.host_limit
        if has_room and self.policy == "offload":
            return f"It does not fit: {shorter}."
        return f"It does not fit: {more}, or {shorter}."


def _layer_lines(plan: Plan) -> list[str]:
    """Returns a line for each range of layers with the same policy."""
    lines: list[str] = []
    policies: Sequence[LayerPolicy | None] = plan.policies or (None,) * len(plan.rows)
    for policy, group in groupby(range(len(plan.rows)), key=lambda index: policies[index]):
        layers = list(group)
        name = f"layer {layers[0]}"
        if len(layers) > 1:
            name = f"layers {layers[0]} to {layers[-1]}"
        kept = "all kept on the device"
        if policy is not None:
            kept = f"input on {policy.inputs}, attention "
            kept += "recomputed" if policy.attention == RECOMPUTE else f"on {policy.attention}"
        rows = [plan.rows[index] for index in layers]
        sizes = {
            "input": max(row.inputs for row in rows),
            "attention": max(row.attention for row in rows),
            "backward": max(row.backward for row in rows),
        }
        shown = ", ".join(f"{what} {size / 2**20:,.1f}" for what, size in sizes.items())
        lines.append(f"  {name}: {kept} (MiB each: {shown})")
    return lines


def plan(
    model: nn.Module,
    tokens: int,
    policy: str = "auto",
    *,
    device_gib: float | None = None,
    host_gib: float | None = None,
    precision: str = "true",
    **options: Any,
) -> Plan:
    """Predicts the memory of a training step, without a GPU and without running the step.

    The model runs on the meta device, where tensors have shapes but no memory. The bytes of these
    tensors are counted.

    Args:
        model: A transformers causal LM, or a PeftModel around one, on any device. Apply
            `lctrain.patch_model` first: only the outputs of lctrain's attention can be kept.
        tokens: Number of tokens of the pack, which is one document.
        policy: Name of the memory policy: "none", "checkpoint", "offload", or "auto" for the first
            that fits.
        device_gib: Memory of the GPU in GiB; None if it is unknown.
        host_gib: Host memory in GiB that the step may use; None for no limit.
        precision: "true" if activations have the dtype of the weights, or "bf16-mixed" as in
            Lightning.
        **options: Further fields of `MemoryConfig`, such as `keep_attention`.

    Raises:
        ValueError: if an option is out of range, or the model cannot run on the meta device.
    """
    if policy in WITH_HOST:
        options = {**options, "host_gib": host_gib}
    config = MemoryConfig(name=policy, device_gib=device_gib, **options)
    limits = tuple(None if gib is None else int(gib * GIB) for gib in (device_gib, host_gib))
    measured = profile(model, tokens, precision, config.mlp_tokens)
    return plan_of(measured, config, *limits)


def plan_of(
    measured: Profile, config: MemoryConfig, device_limit: int | None, host_limit: int | None
) -> Plan:
    """Returns the plan of a memory policy, from the measured bytes of a step.

    Args:
        measured: Bytes of the step, from `profile`.
        config: Settings of the policy; "auto" takes the first policy that fits.
        device_limit: Memory of the GPU in bytes; None if unknown.
        host_limit: Host memory in bytes that the step may use; None for no limit.
    """
    if config.name != "auto":
        return _plan(measured, config, device_limit, host_limit)
    count = len(measured.layers)
    if host_limit is not None:  # inputs of layers that do not fit on the host stay on the GPU
        on_host = host_limit // max(aligned(layer.inputs) for layer in measured.layers)
        config = replace(config, keep_inputs=max(_kept_inputs(config, count), count - on_host))
    found = None
    # Only lctrain's attention can be kept; either all layers have it, or none has.
    can_keep = any(layer.attention for layer in measured.layers)
    for candidate in _candidates(config, count if can_keep else 0):
        found = _plan(measured, candidate, device_limit, host_limit)
        if found.fits is not False:
            return found
    assert found is not None
    return found


def _candidates(config: MemoryConfig, layers: int) -> list[MemoryConfig]:
    """Returns the policies that "auto" tries in turn: the fastest first, the most frugal last.

    Args:
        config: Settings of "auto".
        layers: Number of layers whose attention can be kept.
    """

    def make(name: str, **options: Any) -> MemoryConfig:
        unused = {} if name in WITH_HOST else {"keep_inputs": None, "host_gib": None}
        return replace(config, name=name, **(unused | options))

    ends = [] if config.mlp_tokens else [make("none")]
    ends += [make("checkpoint", keep_attention=layers)]
    ends.append(make("offload", keep_attention=layers))
    for kept in reversed(range(layers)):  # attention outputs of the other layers on the host
        ends.append(make("offload", keep_attention=kept, host_attention=layers - kept))
    for kept in reversed(range(layers)):
        ends.append(make("offload", keep_attention=kept))
    return [*ends, make("checkpoint"), make("offload", keep_inputs=0)]


def _plan(
    measured: Profile, config: MemoryConfig, device_limit: int | None, host_limit: int | None
) -> Plan:
    policies = policies_of(config, len(measured.layers))
    parts, device, host = _needed(measured, policies)
    limited = device_limit is not None
    has_room = host_limit is None or host <= host_limit
    fits = None if has_room else False  # the GPU's memory is unknown so far
    if device_limit is not None:
        fits = device <= device_limit and has_room
    return Plan(
        tokens=measured.tokens,
        policy=config.name,
        policies=tuple(policies),
        device_bytes=device,
        host_bytes=host,
        longest=_longest(measured, policies, device_limit, host_limit) if limited else None,
        fits=fits,
        parts=parts,
        rows=measured.layers,
        device_limit=device_limit,
        host_limit=host_limit,
    )


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
        "keep_attention": config.keep_attention,
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
        found.append(LayerPolicy(HOST if on_host else DEVICE, attention))
    return found


def _kept_inputs(config: MemoryConfig, layers: int) -> int:
    """Returns the number of layers whose inputs stay on the GPU under the policy offload."""
    return min(DEFAULT_INPUTS, layers) if config.keep_inputs is None else config.keep_inputs


def _needed(
    measured: Profile, policies: Sequence[LayerPolicy], scale: float = 1.0
) -> tuple[dict[str, int], int, int]:
    """Returns the bytes on the GPU by purpose, their sum, and the bytes on the host.

    Args:
        measured: Bytes of a step, from `profile`.
        policies: LayerPolicy of every layer; empty if no layer is checkpointed.
        scale: Number of tokens divided by the measured number of tokens: factor of all activations.
    """
    layers = measured.layers
    if policies:
        kept, working, host = _checkpointed(layers, policies)
    else:
        kept = sum(layer.saved + layer.inputs for layer in layers)
        working = max(layer.backward - layer.saved for layer in layers)
        host = 0
    head = scale * measured.head + measured.loss
    parts = {
        "weights": measured.weights,
        "gradients": measured.gradients,
        "optimizer": measured.optimizer,
        "kept for the backward": int(scale * kept),
        "outside of the layers": int(scale * measured.around),
        "largest layer, or the loss": int(max(scale * working, head)),
        "reserve": RESERVE,
    }
    return parts, sum(parts.values()), int(scale * host)


def _checkpointed(
    layers: Sequence[LayerBytes], policies: Sequence[LayerPolicy]
) -> tuple[int, int, int]:
    """Returns three numbers of bytes for checkpointed layers.

    The backward goes from the last layer to the first, and frees what a layer kept once that layer
    is done. The peak is therefore reached at the layer with the largest sum of two terms: its own
    forward or backward, and what this layer and all earlier layers keep.

    Returns:
        Bytes that all layers together keep on the GPU; bytes at the peak beyond these; bytes on the
        host.
    """
    kept, host, most = 0, 0, 0
    for layer, policy in zip(layers, policies, strict=True):
        kept += layer.inputs if policy.inputs == DEVICE else 0
        kept += layer.attention if policy.attention == DEVICE else 0
        host += aligned(layer.inputs) if policy.inputs == HOST else 0
        host += layer.attention if policy.attention == HOST else 0
        # Backward: this layer's tensor is on the GPU, and the earlier layer's is prefetched there.
        # Forward: two tensors wait on the GPU for their copies to the host.
        fetched = MOST_WAITING * layer.inputs if policy.inputs == HOST else 0
        fetched += MOST_WAITING * layer.attention if policy.attention == HOST else 0
        again = layer.attention if policy.attention != RECOMPUTE else 0
        backward = layer.backward - again + layer.inputs  # + the gradient of the layer's output
        most = max(most, kept + fetched + max(backward, layer.forward))
    return kept, most - kept, host


def _longest(
    measured: Profile,
    policies: Sequence[LayerPolicy],
    device_limit: int | None,
    host_limit: int | None,
) -> int:
    """Returns the largest number of tokens that fits, a multiple of 1024; 0 if none fits."""

    def fit(tokens: int) -> bool:
        _, device, host = _needed(measured, policies, tokens / measured.tokens)
        on_host = host_limit is None or host <= host_limit
        return on_host and (device_limit is None or device <= device_limit)

    low, high = 0, LARGEST // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fit(middle * _STEP) else (low, middle - 1)
    return low * _STEP
