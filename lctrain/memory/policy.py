"""Gives a model the memory policy of a configuration."""

from __future__ import annotations

from typing import Any

from lctrain.config import MemoryConfig
from lctrain.memory.budget import HOST_SHARE, free_host_bytes
from lctrain.memory.layers import (
    ATTENTION,
    DEVICE,
    HOST,
    INPUT,
    RECOMPUTE,
    LayerCheckpoints,
    LayerPolicy,
    checkpointed_layers,
)
from lctrain.memory.store import HostStore


def use_policy(
    model: Any, policy: str = "checkpoint", *, tokens: int | None = None, **options: Any
) -> LayerCheckpoints | None:
    """Lets the layers of a model keep, offload and recompute what the backward needs.

    Gradients are those of plain checkpointing, bit by bit.

    Args:
        model: A transformers model, or a PeftModel around one. Patch it by `lctrain.patch_model`
            first: only lctrain's attention can be kept.
        policy: "none", "checkpoint" or "offload"; see `MemoryConfig`.
        tokens: Number of tokens of the longest pack. Arenas have its size.
        **options: Further fields of `MemoryConfig`, such as `keep_attention`.

    Returns:
        The handle, whose `remove` ends the policy; None for "none".

    Raises:
        ValueError: if an option is out of range, or the model has no layers that can be
            checkpointed.
    """
    return apply_config(model, MemoryConfig(name=policy, **options), tokens)


def apply_config(
    model: Any, config: MemoryConfig, tokens: int | None = None
) -> LayerCheckpoints | None:
    """Applies a configuration; see `use_policy`.

    Args:
        model: A transformers model, or a PeftModel around one.
        config: Settings of the policy.
        tokens: Number of tokens of the longest pack, if the configuration has none.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if config.name == "none":
        return None
    if not getattr(inner, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"memory must be none for {type(inner).__name__}, whose layers transformers cannot "
            f"checkpoint, got {config.name}. Use memory=none."
        )
    layers = len(checkpointed_layers(inner))
    policies = policies_of(config, layers)
    store = None
    if any(HOST in (policy.inputs, policy.attention) for policy in policies):
        attention = sum(policy.attention == HOST for policy in policies)
        counts = {
            INPUT: sum(policy.inputs == HOST for policy in policies),
            f"{ATTENTION} 2": attention,  # lse
            f"{ATTENTION} 3": attention,  # outputs
        }
        store = HostStore(counts, host_bytes(config), tokens=config.tokens or tokens)
    return LayerCheckpoints(inner, policies, store)


def policies_of(config: MemoryConfig, layers: int) -> list[LayerPolicy]:
    """Returns the policy of every layer.

    Args:
        config: Settings of the policy checkpoint or offload.
        layers: Number of layers.
    """
    found = []
    for from_last in reversed(range(layers)):
        on_host = config.name == "offload" and from_last >= config.keep_inputs
        attention = RECOMPUTE
        if from_last < config.keep_attention:
            attention = DEVICE
        elif from_last < config.keep_attention + config.host_attention:
            attention = HOST
        found.append(LayerPolicy(HOST if on_host else DEVICE, attention))
    return found


def host_bytes(config: MemoryConfig) -> int:
    """Returns the most bytes that a policy may take on the host."""
    if config.host_gib is not None:
        return int(config.host_gib * 2**30)
    return int(HOST_SHARE * free_host_bytes())
