"""ReferenceModel: the policy before training, as its adapters switched off or as a frozen copy."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lctrain.attention import is_patched
from lctrain.batch import PackedBatch
from lctrain.config import MemoryConfig
from lctrain.instances import require_instance
from lctrain.limits import require
from lctrain.loss import TokenLogProbs, evaluation_mode, token_log_probs
from lctrain.memory.layers import checkpointed_layers
from lctrain.models import patch_model
from lctrain.models.adapters import inside_adapters, trained_beside_adapters
from lctrain.pluralize import pluralize


class ReferenceModel:
    """The reference model of a policy, for preference and policy losses.

    A policy with PEFT's adapters is its own reference, with the adapters off; adapters that have
    been trained before are off, too. Any other policy is copied, and the copy is frozen. `memory`
    says where the layers of the copy are: on the policy's device, or in the host's memory, from
    which each layer's weights are copied to the device while it runs. The results are the same. A
    reference has no dropout.

    Args:
        policy: The model before training, not patched.
        memory: Settings of memory; `memory.reference` says where the copy's layers are.
        attention: Name of the copy's attention.
        **options: Options of `lctrain.patch_model` for the copy.

    Raises:
        ValueError: if the policy is patched, if memory.reference is set for a policy with adapters,
            if such a policy trains other weights, too, if FSDP2 has sharded a policy to copy, or if
            transformers cannot name the layers of a copy in the host's memory.
    """

    def __init__(
        self,
        policy: Any,
        memory: MemoryConfig | None = None,
        attention: str = "flash",
        **options: Any,
    ) -> None:
        require_instance("policy", policy, nn.Module, "Pass the model before it is trained.")
        memory = MemoryConfig() if memory is None else memory
        require_instance("memory", memory, MemoryConfig, "Pass lctrain.config.MemoryConfig(...).")
        self._policy = policy
        self._copy: Any = None
        self._on_host = memory.reference_on_host
        self._layers: list[HostLayer] | None = None
        inner = inside_adapters(policy)
        require(
            not is_patched(inner),
            "policy must not be patched when its reference is made, got a patched "
            f"{type(inner).__name__}. Patch it afterwards.",
        )
        if inner is not policy:
            require(
                memory.reference is None,
                f"memory.reference must be null for a policy with adapters, got "
                f"{memory.reference}: the policy is its own reference. Leave it out.",
            )
            beside = trained_beside_adapters(policy)
            require(
                not beside,
                "policy must train nothing but its adapters, since its reference is the policy "
                f"with its adapters off, got {pluralize(len(beside), 'other trained parameter')}, "
                f"such as {', '.join(beside[:1])}. Freeze them (LoRA's bias must be 'none'), or "
                "name their modules in modules_to_save.",
            )
            return
        require(
            not any(isinstance(module, FSDPModule) for module in policy.modules()),
            "policy must be whole when its reference is copied, got one that FSDP2 has sharded. "
            "Make the reference before the model is sharded, or train adapters.",
        )
        require(
            not self._on_host or bool(checkpointed_layers(policy)),
            f"memory.reference must be device for {type(policy).__name__}, whose layers "
            "transformers does not name, got host. Use memory.reference=device.",
        )
        self._copy = copy.deepcopy(policy).requires_grad_(False).eval()
        patch_model(self._copy, attention, **options)

    def log_probs(self, batch: PackedBatch, *, temperature: float = 1.0) -> TokenLogProbs:
        """Returns the log-probabilities of a batch's trained tokens.

        Args:
            batch: A pack on the policy's device.
            temperature: As in `token_log_probs`.
        """
        if self._copy is None:
            with evaluation_mode(self._policy), self._policy.disable_adapter():
                return token_log_probs(self._policy, batch, temperature=temperature)
        device = batch.input_ids.device
        if not self._on_host:
            self._copy.to(device)
        else:
            self._layers = keep_layers_on_host(self._copy, device, self._layers)
        with torch.no_grad():
            return token_log_probs(self._copy, batch, temperature=temperature)


class HostLayer:
    """Hooks of one layer, which copy its weights to the device while it runs.

    Args:
        layer: The layer, frozen.
        device: Device on which it runs.
    """

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self._weights = [(parameter, parameter.detach().cpu()) for parameter in layer.parameters()]
        self.run_on(device)
        layer.register_forward_pre_hook(self._to_device)
        layer.register_forward_hook(self._to_host, always_call=True)

    def run_on(self, device: torch.device) -> None:
        """Changes the device on which the layer runs. Weights for a GPU are in pinned memory."""
        self.device = device
        if device.type == "cuda":
            self._weights = [
                (parameter, stored.pin_memory()) for parameter, stored in self._weights
            ]
        for parameter, stored in self._weights:
            parameter.data = stored

    def _to_device(self, layer: nn.Module, arguments: Any) -> None:
        for parameter, stored in self._weights:
            parameter.data = stored.to(self.device, non_blocking=True, copy=True)

    def _to_host(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        for parameter, stored in self._weights:
            parameter.data = stored


def keep_layers_on_host(
    model: nn.Module, device: torch.device, kept: list[HostLayer] | None = None
) -> list[HostLayer]:
    """Keeps a frozen model's layers in the host's memory, and everything else on the device.

    The embedding and the head stay on the device, because a loss reads their weights directly.

    Args:
        model: A transformers model without gradients.
        device: Device on which the model runs.
        kept: What an earlier call for this model returned; None for the first call. The model may
            run on another device now.
    """
    if kept is not None and all(layer.device == device for layer in kept):
        return kept
    layers = checkpointed_layers(model)
    inside = {id(weight) for layer in layers for weight in layer.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if kept is None:
        return [HostLayer(layer, device) for layer in layers]
    for layer in kept:
        layer.run_on(device)
    return kept
