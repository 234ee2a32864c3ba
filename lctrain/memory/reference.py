"""ReferenceModel: the policy before training, as its adapters switched off or as a frozen copy."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.attention import is_patched
from lctrain.batch import PackedBatch
from lctrain.config import MemoryConfig
from lctrain.limits import require
from lctrain.loss import TokenLogProbs, evaluation_mode, token_log_probs
from lctrain.memory.layers import checkpointed_layers
from lctrain.models import patch_model
from lctrain.models.adapters import inside_adapters


class ReferenceModel:
    """The reference model of a policy, for preference and policy losses.

    A policy with PEFT's adapters is its own reference, with the adapters off. Any other policy is
    copied, and the copy is frozen. `memory` says where the layers of the copy are: on the policy's
    device, or in the host's memory, from which each layer's weights are copied to the device while
    it runs. The results are the same. A reference has no dropout.

    Args:
        policy: The model before training, not patched.
        memory: Settings of memory; `memory.reference` says where the copy's layers are.
        attention: Name of the copy's attention.
        **options: Options of `lctrain.patch_model` for the copy.

    Raises:
        ValueError: if the policy is patched, if memory.reference is set for a policy with adapters,
            or if transformers cannot name the layers of a copy in the host's memory.
    """

    def __init__(
        self,
        policy: Any,
        memory: MemoryConfig | None = None,
        attention: str = "flash",
        **options: Any,
    ) -> None:
        memory = MemoryConfig() if memory is None else memory
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
            return
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
        elif self._layers is None:
            self._layers = keep_layers_on_host(self._copy, device)
        with torch.no_grad():
            return token_log_probs(self._copy, batch, temperature=temperature)


class HostLayer:
    """Hooks of one layer, which copy its weights to the device while it runs.

    Args:
        layer: The layer, frozen.
        device: Device on which it runs.
    """

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self._device = device
        self._weights: list[tuple[nn.Parameter, Tensor]] = []
        for parameter in layer.parameters():
            stored = parameter.detach().to("cpu")
            if device.type == "cuda":
                stored = stored.pin_memory()
            self._weights.append((parameter, stored))
            parameter.data = stored
        layer.register_forward_pre_hook(self._to_device)
        layer.register_forward_hook(self._to_host, always_call=True)

    def _to_device(self, layer: nn.Module, arguments: Any) -> None:
        for parameter, stored in self._weights:
            parameter.data = stored.to(self._device, non_blocking=True, copy=True)

    def _to_host(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        for parameter, stored in self._weights:
            parameter.data = stored


def keep_layers_on_host(model: nn.Module, device: torch.device) -> list[HostLayer]:
    """Keeps a frozen model's layers in the host's memory, and everything else on the device.

    The embedding and the head stay on the device, because a loss reads their weights directly.

    Args:
        model: A transformers model without gradients.
        device: Device on which the model runs.
    """
    layers = checkpointed_layers(model)
    inside = {id(weight) for layer in layers for weight in layer.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return [HostLayer(layer, device) for layer in layers]
