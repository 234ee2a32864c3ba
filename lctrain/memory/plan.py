"""plan: predicts the memory of a training step on GPU and host, and chooses a policy that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torch import nn

from lctrain.allocator import EXPANDABLE, VARIABLES, has_expandable_segments
from lctrain.config import MemoryConfig
from lctrain.config.memory import WITH_HOST
from lctrain.instances import require_instance, require_int
from lctrain.limits import require
from lctrain.memory.arena import aligned
from lctrain.memory.candidates import fastest, policies_of
from lctrain.memory.compiled import REFUSED
from lctrain.memory.duration import step_seconds
from lctrain.memory.layers import DEVICE, HOST, REBUILT, RECOMPUTE, LayerPolicy, is_traceable
from lctrain.memory.optimizer import ADAMW
from lctrain.memory.peaks import layer_peaks
from lctrain.memory.profile import LayerBytes, Profile, profile
from lctrain.memory.reserved import CONTEXT, allocator_bytes, held_bytes

GIB = 2**30
KNOWN_GPU = "NVIDIA H200"
ALLOCATOR = "lost by the allocator"
CUDA = "CUDA's context and libraries"
FRAGMENTS = (
    f"Set {VARIABLES[0]}={EXPANDABLE} before torch is imported, as lctrain-train does: the "
    "allocator then loses less."
)
LARGEST = 2**27
"""Most tokens of a pack for which a context length is searched."""
_ATTENTION = {RECOMPUTE: "recomputed", REBUILT: "recomputed once, for both runs"}
_STEP = 1024  # tokens; the longest context is given in multiples of it


@dataclass(frozen=True)
class Plan:
    """Predicted memory of one training step (forward, backward, optimizer) under one memory policy.

    Attributes:
        tokens: Number of tokens of the pack.
        policy: Name of the memory policy: none, checkpoint or offload.
        policies: LayerPolicy of every layer; empty for the policy none.
        by_head: Whether attention's backward runs one key/value head at a time.
        device_bytes: Bytes that the process needs on the GPU at its peak: tensors (weights,
            gradients, optimizer states, activations), what the allocator loses, and CUDA.
        held_bytes: Bytes of free blocks that the allocator holds beyond device_bytes while the GPU
            has room, and gives back otherwise.
        host_bytes: Bytes of host memory for tensors that the policy moves there, and for states of
            optim=adamw_host.
        longest: Largest number of tokens that fits with this policy, a multiple of 1024; None if
            the GPU's memory is unknown.
        fits: Whether the step fits into the GPU's and the host's memory; None if that is unknown.
        seconds: Expected seconds of a step on one document on an H200, without the optimizer; None
            for a head dim or precision that was not measured there, and for sharded parameters.
        parts: `device_bytes` by purpose, such as "weights" or "optimizer".
        rows: Bytes of every layer.
        device_limit: Memory of the GPU in bytes; None if unknown.
        host_limit: Bytes that the step may use on the host; None for no limit.
    """

    tokens: int
    policy: str
    policies: tuple[LayerPolicy, ...]
    by_head: bool
    device_bytes: int
    held_bytes: int
    host_bytes: int
    longest: int | None
    fits: bool | None
    seconds: float | None
    parts: dict[str, int]
    rows: tuple[LayerBytes, ...]
    device_limit: int | None
    host_limit: int | None

    @property
    def reserved_bytes(self) -> int:
        """Bytes that the allocator reserves, as torch.cuda.max_memory_reserved counts them."""
        return self.device_bytes - self.parts[CUDA] + self.held_bytes

    @property
    def tensor_bytes(self) -> int:
        """Peak bytes of the tensors, as torch.cuda.max_memory_allocated counts them."""
        return self.device_bytes - self.parts[CUDA] - self.parts[ALLOCATOR]

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
        if self.by_head:
            lines.append("attention's backward computes one key/value head at a time")
        if self.parts[CUDA]:
            lines.append(
                f"peak of the tensors {self.tensor_bytes / GIB:.2f} GiB; with room for it, the "
                f"allocator reserves {self.reserved_bytes / GIB:.2f} GiB"
            )
        if self.seconds is not None:
            lines.append(
                f"expected on one {KNOWN_GPU}: {self.seconds:,.1f} s a step, "
                f"{self.tokens / self.seconds:,.0f} tokens/s, without the optimizer"
            )
        if self.longest is not None:
            lines.append(f"longest context that fits with these settings: {self.longest:,} tokens")
        if self.policies and self.parts[CUDA] and not has_expandable_segments():
            lines.append(FRAGMENTS)
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
        has_room = self.host_limit is None or self.host_bytes <= self.host_limit
        if not has_room and self.policy != "offload":  # then host_bytes are those of the states
            more = "take an optimizer with its states on the GPU (optim=adamw, optim=adamw_8bit)"
            return f"It does not fit into host memory: {more}, or {shorter}."
        more = {
            "none": "set memory=checkpoint",
            "checkpoint": "set memory=offload",
        }.get(self.policy, "raise memory.host_gib")
        if has_room and self.policy == "offload":
            return f"It does not fit: {shorter}."
        return f"It does not fit: {more}, or {shorter}."


def _layer_lines(plan: Plan) -> list[str]:
    """Returns one line of text for each policy that layers have, with the numbers of its layers."""
    lines: list[str] = []
    policies: Sequence[LayerPolicy | None] = plan.policies or (None,) * len(plan.rows)
    for policy in dict.fromkeys(policies):
        layers = [index for index, other in enumerate(policies) if other == policy]
        name = f"layer{'s' if len(layers) > 1 else ''} {_ranges(layers)}"
        kept = "all kept on the device"
        if policy is not None:
            kept = "input rebuilt" if policy.inputs == RECOMPUTE else f"input on {policy.inputs}"
            kept += ", attention "
            kept += _ATTENTION.get(policy.attention, f"on {policy.attention}")
        rows = [plan.rows[index] for index in layers]
        sizes = {
            "input": max(row.inputs for row in rows),
            "attention": max(row.attention for row in rows),
            "backward": max(row.backward for row in rows),
        }
        shown = ", ".join(f"{what} {size / 2**20:,.1f}" for what, size in sizes.items())
        lines.append(f"  {name}: {kept} (MiB each: {shown})")
    return lines


def _ranges(numbers: Sequence[int]) -> str:
    """Returns rising numbers as text, such as "0 to 3, 6"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in found)


def plan(
    model: nn.Module,
    tokens: int,
    policy: str = "auto",
    *,
    device_gib: float | None = None,
    host_gib: float | None = None,
    precision: str = "true",
    quantize: str | None = None,
    optimizer: str = ADAMW,
    micro_batches: int = 1,
    **options: Any,
) -> Plan:
    """Predicts the memory of a training step, without a GPU and without running the step.

    The model runs on the meta device, where tensors have shapes but no memory. The bytes of these
    tensors are counted.

    Args:
        model: A transformers causal LM, or a PeftModel around one, on any device. Apply
            `lctrain.patch_model` first: only the outputs of lctrain's attention can be kept. If it
            will be compiled, compile it first: attention's gradients then take memory of their own.
        tokens: Number of tokens of the pack, which is one document.
        policy: Name of the memory policy: "none", "checkpoint", "offload", or "auto" for the first
            that fits.
        device_gib: Memory of the GPU in GiB; None if it is unknown.
        host_gib: Host memory in GiB that the step may use; None for no limit.
        precision: "true" if activations have the dtype of the weights, or "bf16-mixed" as in
            Lightning.
        quantize: Format in which frozen dense weights will be stored: nf4, int8 or None.
        optimizer: Dotted name of the optimizer's class.
        micro_batches: Number of forwards and backwards per optimizer step. With one, no gradients
            exist when the step begins: those of the step before were set to None, as
            `optimizer.zero_grad()` does. With more, all gradients exist throughout.
        **options: Further fields of `MemoryConfig`, such as `keep_attention`.

    Raises:
        ValueError: if an option is out of range, the model cannot run on the meta device, or
            torch.compile cannot trace the policy that a compiled model is to have.
    """
    require_instance("model", model, nn.Module, "Pass a causal LM of transformers.")
    require_int("tokens", tokens, 1, "Pass the tokens of a pack.")
    require_int("micro_batches", micro_batches, 1, "Pass the micro-batches of an optimizer step.")
    if policy in WITH_HOST:
        options = {**options, "host_gib": host_gib}
    config = MemoryConfig(name=policy, device_gib=device_gib, **options)
    limits = tuple(None if gib is None else int(gib * GIB) for gib in (device_gib, host_gib))
    measured = profile(model, tokens, precision, config.mlp_tokens, quantize, optimizer, limits[0])
    return plan_of(replace(measured, accumulates=micro_batches > 1), config, *limits)


def plan_of(
    measured: Profile, config: MemoryConfig, device_limit: int | None, host_limit: int | None
) -> Plan:
    """Returns the plan of a memory policy, from the measured bytes of a step.

    Args:
        measured: Bytes of the step, from `profile`.
        config: Settings of the policy; "auto" takes the fastest policy that fits.
        device_limit: Memory of the GPU in bytes; None if unknown.
        host_limit: Host memory in bytes that the step may use; None for no limit.
    """
    if config.name != "auto":
        return _plan(measured, config, device_limit, host_limit)
    tried: list[tuple[int, int, MemoryConfig]] = []
    bytes_of = {False: measured, True: measured.by_head()}

    def fits(candidate: MemoryConfig) -> bool:
        step = bytes_of[candidate.backward_by_head]
        _, device, host = _needed(step, policies_of(candidate, len(measured.layers)))
        excess = 0 if host_limit is None else max(host - host_limit, 0)
        tried.append((excess, device, candidate))
        return excess == 0 and (device_limit is None or device <= device_limit)

    chosen = fastest(config, measured, host_limit, fits)
    if chosen is None:  # host first: a process without memory is killed
        *_, chosen = min(tried, key=lambda one: one[:2])
    return _plan(measured, chosen, device_limit, host_limit)


def _plan(
    measured: Profile, config: MemoryConfig, device_limit: int | None, host_limit: int | None
) -> Plan:
    policies = policies_of(config, len(measured.layers))
    if measured.compiled:
        require(is_traceable(policies, config.backward_by_head), REFUSED)
    if config.backward_by_head:
        measured = measured.by_head()
    parts, device, host = _needed(measured, policies)
    limited = device_limit is not None
    has_room = host_limit is None or host <= host_limit
    fits = None if has_room else False  # the GPU's memory is unknown so far
    if device_limit is not None:
        fits = device <= device_limit and has_room
    expandable = measured.on_gpu and has_expandable_segments()
    return Plan(
        tokens=measured.tokens,
        policy=config.name,
        policies=tuple(policies),
        by_head=config.backward_by_head,
        device_bytes=device,
        held_bytes=held_bytes(measured.layers, policies, expandable),
        host_bytes=host,
        longest=_longest(measured, policies, device_limit, host_limit) if limited else None,
        fits=fits,
        seconds=step_seconds(measured, policies, KNOWN_GPU),
        parts=parts,
        rows=measured.layers,
        device_limit=device_limit,
        host_limit=host_limit,
    )


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
    moments, host = _checkpointed(layers, policies) if policies else (_uncheckpointed(layers), 0)
    found = [
        (scale * moment.kept, scale * moment.working, gradients)
        for moment, gradients in zip(moments, _gradients(measured), strict=True)
    ]
    before = measured.gradients if measured.accumulates else 0  # the loss has that of the head
    found.append((scale * moments[-1].kept, scale * measured.head + measured.loss, before))
    found.append((0, 0, measured.gradients))  # the optimizer's step
    kept, working, gradients = max(found, key=sum)
    parts = {
        "weights": measured.weights,
        "gradients": gradients,
        "optimizer": measured.optimizer,
        "kept for the backward": int(kept),
        "outside of the layers": int(scale * measured.around),
        "largest layer, or the loss": int(working),
        ALLOCATOR: 0,
        CUDA: 0,
    }
    if measured.on_gpu:
        lost = allocator_bytes(layers, policies, has_expandable_segments(), scale)
        parts |= {ALLOCATOR: lost, CUDA: CONTEXT}
    return parts, sum(parts.values()), int(scale * host) + measured.host


@dataclass(frozen=True)
class _Moment:
    """Bytes of activations on the GPU during a layer's backward.

    Attributes:
        kept: Bytes that this layer and the earlier ones keep for their backward.
        working: Further bytes that the layer needs.
    """

    kept: int
    working: int


def _gradients(measured: Profile) -> list[int]:
    """Returns the bytes of weight gradients beside those that a layer's backward makes, by layer.

    The largest number is that of the first layer, except while gradients accumulate.
    """
    if measured.accumulates:
        return [measured.gradients] * len(measured.layers)
    found = [measured.head_gradients]  # of the last layer
    for layer in reversed(measured.layers[1:]):
        found.append(found[-1] + layer.gradients)
    return found[::-1]


def _uncheckpointed(layers: Sequence[LayerBytes]) -> list[_Moment]:
    """Returns the bytes during the backward of every layer, if no layer is checkpointed."""
    kept = accumulate(layer.saved + layer.inputs for layer in layers)
    return [
        _Moment(size, layer.beside - layer.saved) for size, layer in zip(kept, layers, strict=True)
    ]


def _checkpointed(
    layers: Sequence[LayerBytes], policies: Sequence[LayerPolicy]
) -> tuple[list[_Moment], int]:
    """Returns the bytes of checkpointed layers in a forward and backward.

    Returns:
        (bytes on the GPU during the backward of every layer, bytes on the host)
    """
    kept = host = 0
    found = []
    peaks = layer_peaks(layers, policies)
    for layer, policy, peak in zip(layers, policies, peaks, strict=True):
        kept += layer.inputs if policy.inputs == DEVICE else 0
        kept += layer.attention if policy.attention == DEVICE else 0
        host += aligned(layer.inputs) if policy.inputs == HOST else 0
        host += layer.attention if policy.attention == HOST else 0
        found.append(_Moment(kept, peak - kept))
    return found, host


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
