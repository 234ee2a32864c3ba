"""use_policy: applies a memory policy (what layers keep, offload or recompute) to a model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lctrain.config import MemoryConfig
from lctrain.instances import require_int
from lctrain.limits import require
from lctrain.memory.budget import HOST_SHARE, free_device_bytes, free_host_bytes
from lctrain.memory.candidates import policies_of
from lctrain.memory.compiled import REFUSED, is_compiled_around
from lctrain.memory.layers import (
    ATTENTION,
    HOST,
    INPUT,
    LayerCheckpoints,
    checkpointed_layers,
    is_traceable,
    remove_policy,
)
from lctrain.memory.optimizer import ADAMW, optimizer_bytes
from lctrain.memory.plan import GIB, Plan, plan_of
from lctrain.memory.profile import profile
from lctrain.memory.quantized import stored_bytes
from lctrain.memory.shards import divided
from lctrain.memory.store import HostStore
from lctrain.run.rank import ranks_on_machine
from lctrain.warn import warn_caller

log = logging.getLogger(__name__)


def use_policy(
    model: Any,
    policy: str = "checkpoint",
    *,
    tokens: int | None = None,
    micro_batches: int = 1,
    **options: Any,
) -> LayerCheckpoints | None:
    """Applies a memory policy to a model: its layers keep, offload or recompute their activations.

    Gradients have the same bits as with plain activation checkpointing.

    Args:
        model: A transformers model, or a PeftModel around one. Apply `lctrain.patch_model` first:
            only the outputs of lctrain's attention can be kept.
        policy: Name of the policy: "none", "checkpoint", "offload" or "auto"; see `MemoryConfig`.
        tokens: Number of tokens of the longest pack, by which host memory is reserved. "auto"
            requires it.
        micro_batches: Number of forwards and backwards per optimizer step, which "auto" assumes; as
            in `lctrain.memory.plan`.
        **options: Further fields of `MemoryConfig`, such as `keep_attention`.

    Returns:
        A handle, whose method `remove` undoes the policy; None if no layer is checkpointed.

    Raises:
        ValueError: if an option is out of range, or transformers cannot checkpoint the model's
            layers.
    """
    require_int("micro_batches", micro_batches, 1, "Pass the micro-batches of an optimizer step.")
    config = MemoryConfig(name=policy, **options)
    return apply_config(model, config, tokens, micro_batches=micro_batches)


def apply_config(
    model: Any,
    config: MemoryConfig,
    tokens: int | None = None,
    precision: str = "true",
    device: torch.device | None = None,
    ranks: int | None = None,
    optimizer: str = ADAMW,
    chosen: Plan | None = None,
    shards: int | None = None,
    least: Callable[[int], int] = int,
    micro_batches: int = 1,
) -> LayerCheckpoints | None:
    """Applies the memory policy that a configuration describes; see `use_policy`.

    A model that will be sharded is passed before FSDP2 shards it.

    Args:
        model: A transformers model, or a PeftModel around one.
        config: Settings of the policy.
        tokens: Number of tokens of the longest pack; `config.tokens` takes precedence.
        precision: "true" or "bf16-mixed", which the plan of "auto" assumes.
        device: Device on which the model is trained; None for the model's current device.
        ranks: Number of ranks on this machine, which share its memory; None takes that of torchrun
            or srun, else 1.
        optimizer: Dotted name of the optimizer's class. Its states take GPU and host memory.
        chosen: Plan of "auto", from `plan_for` with the same arguments; None computes it.
        shards: As in `plan_for`.
        least: As in `plan_for`.
        micro_batches: As in `plan_for`.
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
        if chosen is None:
            chosen = plan_for(
                model,
                config,
                tokens,
                precision,
                device,
                ranks,
                optimizer=optimizer,
                shards=shards,
                least=least,
                micro_batches=micro_batches,
            )
        log.info("%s", chosen)
        if chosen.fits is False:
            warn_caller(f"memory=auto found no policy that fits. {chosen.advice()}")
        if not chosen.policies:
            remove_policy(inner)
            return None
        policies, by_head = list(chosen.policies), chosen.by_head
    else:
        by_head = config.backward_by_head
        policies = policies_of(config, len(checkpointed_layers(inner)))
    if is_compiled_around(model, checkpointed_layers(inner)):
        require(is_traceable(policies, by_head), REFUSED)
    store = None
    if any(HOST in (policy.inputs, policy.attention) for policy in policies):
        attention = sum(policy.attention == HOST for policy in policies)
        counts = {
            INPUT: sum(policy.inputs == HOST for policy in policies),
            f"{ATTENTION} 2": attention,  # lse
            f"{ATTENTION} 3": attention,  # outputs
        }
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        room = host_bytes(config, ranks) - optimizer_bytes(trained, optimizer)[1]
        store = HostStore(counts, max(room, 0), tokens=tokens)
    return LayerCheckpoints(inner, policies, store, config.mlp_tokens, by_head)


def plan_for(
    model: Any,
    config: MemoryConfig,
    tokens: int | None,
    precision: str,
    device: torch.device | None = None,
    ranks: int | None = None,
    quantize: str | None = None,
    optimizer: str = ADAMW,
    shards: int | None = None,
    least: Callable[[int], int] = int,
    micro_batches: int = 1,
) -> Plan:
    """Returns the plan of a model's memory, with this machine's GPU and host memory as limits.

    The GPU's limit is `memory.device_gib` if it is set. Otherwise it is the sum of the GPU's free
    memory and the memory of the model's weights that are already there. For a model on the meta
    device it is the free memory of the GPU, or unknown without a GPU.

    Args:
        model: A transformers model, or a PeftModel around one.
        config: Settings of the policy.
        tokens: Number of tokens of the longest pack.
        precision: "true" if activations have the dtype of the weights, or "bf16-mixed".
        device: Device on which the model is trained; None for the model's current device.
        ranks: Number of ranks on this machine, which share its memory; None takes that of torchrun
            or srun, else 1.
        quantize: Format in which frozen dense weights will be stored: nf4, int8 or None.
        optimizer: Dotted name of the optimizer's class.
        shards: Number of ranks among which FSDP2 will divide the parameters; None if every rank
            keeps a copy.
        least: Function that returns the smallest value that any rank passes. Ranks that share
            parameters need the same plan, so all of them plan with the least free memory.
        micro_batches: Most micro-batches of an optimizer step.

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
        limit += sum(map(stored_bytes, there))
    measured = profile(model, tokens, precision, config.mlp_tokens, quantize, optimizer, limit)
    measured = replace(measured, accumulates=micro_batches > 1)
    if shards is not None:
        measured = divided(measured, model, precision, shards)
    measured = replace(measured, on_gpu=device.type != "cpu")
    limit = None if limit is None else least(limit)
    return plan_of(measured, config, limit, least(host_bytes(config, ranks)))


def host_bytes(config: MemoryConfig, ranks: int | None = None) -> int:
    """Returns the host memory in bytes that a policy may use on this rank.

    Args:
        config: Settings of the policy.
        ranks: Number of ranks on this machine, which share its memory; None takes that of torchrun
            or srun, else 1.
    """
    if config.host_gib is not None:
        return int(config.host_gib * GIB)
    if ranks is None:
        ranks = ranks_on_machine()
    return int(HOST_SHARE * free_host_bytes()) // ranks
