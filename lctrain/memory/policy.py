"""Gives a model the memory policy of a configuration."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from lctrain.config import MemoryConfig
from lctrain.memory.budget import HOST_SHARE, free_device_bytes, free_host_bytes
from lctrain.memory.layers import (
    ATTENTION,
    HOST,
    INPUT,
    LayerCheckpoints,
    checkpointed_layers,
    remove_policy,
)
from lctrain.memory.plan import GIB, Plan, plan_of, policies_of
from lctrain.memory.profile import profile
from lctrain.memory.store import HostStore
from lctrain.warn import warn_caller

log = logging.getLogger(__name__)


def use_policy(
    model: Any, policy: str = "checkpoint", *, tokens: int | None = None, **options: Any
) -> LayerCheckpoints | None:
    """Lets the layers of a model keep, offload and recompute what the backward needs.

    Gradients are those of plain checkpointing, bit by bit.

    Args:
        model: A transformers model, or a PeftModel around one. Patch it by `lctrain.patch_model`
            first: only lctrain's attention can be kept.
        policy: "none", "checkpoint", "offload" or "auto"; see `MemoryConfig`.
        tokens: Number of tokens of the longest pack. Arenas have its size; "auto" needs it.
        **options: Further fields of `MemoryConfig`, such as `keep_attention`.

    Returns:
        The handle, whose `remove` ends the policy; None for "none".

    Raises:
        ValueError: if an option is out of range, or the model has no layers that can be
            checkpointed.
    """
    return apply_config(model, MemoryConfig(name=policy, **options), tokens)


def apply_config(
    model: Any,
    config: MemoryConfig,
    tokens: int | None = None,
    precision: str = "true",
    device: torch.device | None = None,
    ranks: int | None = None,
) -> LayerCheckpoints | None:
    """Applies a configuration; see `use_policy`.

    Args:
        model: A transformers model, or a PeftModel around one.
        config: Settings of the policy.
        tokens: Number of tokens of the longest pack, if the configuration has none.
        precision: "true" or "bf16-mixed", for the plan of "auto".
        device: Device on which the model is trained; None for the device on which it is.
        ranks: Number of ranks that share the host; None for that of torchrun, or 1.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if config.name == "none":
        remove_policy(inner)
        return None
    if not getattr(inner, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"memory must be none for {type(inner).__name__}, whose layers transformers cannot "
            f"checkpoint, got {config.name}. Use memory=none."
        )
    tokens = config.tokens or tokens
    if config.name == "auto":
        chosen = plan_for(model, config, tokens, precision, device, ranks)
        log.info("%s", chosen)
        if chosen.fits is False:
            warn_caller(f"memory=auto found no policy that fits. {chosen.advice()}")
        if not chosen.policies:
            remove_policy(inner)
            return None
        policies = list(chosen.policies)
    else:
        policies = policies_of(config, len(checkpointed_layers(inner)))
    store = None
    if any(HOST in (policy.inputs, policy.attention) for policy in policies):
        attention = sum(policy.attention == HOST for policy in policies)
        counts = {
            INPUT: sum(policy.inputs == HOST for policy in policies),
            f"{ATTENTION} 2": attention,  # lse
            f"{ATTENTION} 3": attention,  # outputs
        }
        store = HostStore(counts, host_bytes(config, ranks), tokens=tokens)
    return LayerCheckpoints(inner, policies, store, config.mlp_tokens)


def plan_for(
    model: Any,
    config: MemoryConfig,
    tokens: int | None,
    precision: str,
    device: torch.device | None = None,
    ranks: int | None = None,
) -> Plan:
    """Returns the plan of a model with the limits of this machine.

    The device's limit is `memory.device_gib`, else what the model's device has free and the memory
    that the model has on it. For a model on device meta without `memory.device_gib`, it is that of
    the GPU, or unknown.

    Args:
        model: A transformers model, or a PeftModel around one.
        config: Settings of the policy.
        tokens: Number of tokens of the longest pack.
        precision: "true" or "bf16-mixed".
        device: Device on which the model is trained; None for the device on which it is.
        ranks: Number of ranks that share the host; None for that of torchrun, or 1.

    Raises:
        ValueError: if the number of tokens is unknown, or the model cannot be planned.
    """
    if tokens is None:
        raise ValueError(
            f"memory.tokens must be set for memory={config.name}, got none. It is the number of "
            "tokens of the longest pack."
        )
    device = next(model.parameters()).device if device is None else device
    limit = None
    if config.device_gib is not None:
        limit = int(config.device_gib * GIB)
    elif device.type == "meta" and torch.cuda.is_available():
        limit = free_device_bytes(torch.device("cuda"))
    elif device.type != "meta":
        limit = free_device_bytes(device)
        there = [p for p in model.parameters() if p.device.type == device.type]
        limit += sum(p.numel() * p.element_size() for p in there)
    measured = profile(model, tokens, precision, config.mlp_tokens)
    return plan_of(measured, config, limit, host_bytes(config, ranks))


def host_bytes(config: MemoryConfig, ranks: int | None = None) -> int:
    """Returns the most bytes that a policy may take on the host, for this rank.

    Args:
        config: Settings of the policy.
        ranks: Number of ranks that share the host; None for that of torchrun, or 1.
    """
    if config.host_gib is not None:
        return int(config.host_gib * GIB)
    if ranks is None:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # Lightning's launcher leaves it unset
    return int(HOST_SHARE * free_host_bytes()) // ranks
