"""AttentionSwap: makes a model's layers call lctrain's attention function, reversibly."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from lctrain.attention.forward import SPEC_ATTRIBUTE, backend_of
from lctrain.attention.spec import AttentionSpec
from lctrain.models.architectures import attention_layers, head_dims, require_supported
from lctrain.models.configs import ConfigSwap
from lctrain.models.frequencies import detach_frequencies
from lctrain.models.heads import check_outputs
from lctrain.models.kinds import KINDS
from lctrain.models.registration import register

OPERATIONS = {"flash": "varlen", "dual_chunk": "dual_chunk", "differential": "differential"}
"""Kind of attention -> its name in the kernels' table of Hopper kernels."""


class AttentionSwap:
    """Replaces the attention of one model by lctrain's, and can restore the model.

    It implements the protocol `lctrain.models.swap.Swap`.

    Attributes:
        model: The model.
        spec: Options of the attention layers, with defaults filled in from the model's config.
        layers: The attention layers by name.
        previous: Name, in transformers, of the attention before the swap.

    Args:
        model: A transformers model.
        spec: Options from the user.

    Raises:
        ValueError: if the model or an option is not supported; the message names the remedy.
    """

    name = "attention"

    def __init__(self, model: Any, spec: AttentionSpec) -> None:
        require_supported(model)
        for head_dim in head_dims(model):
            serving_backend(model, spec, head_dim)
        register()
        self.model = model
        self.spec = KINDS[spec.kind].fit(model, spec)
        self.layers = attention_layers(model)
        self.previous = str(model.config._attn_implementation)
        self._undo = ExitStack()

    def apply(self) -> None:
        """Changes configs and layers, and registers input hooks on the model and inner models."""
        from transformers import PreTrainedModel

        kind = KINDS[self.spec.kind]
        self._undo.callback(detach_frequencies, self.model)
        hooks = [
            (module, kind.hook(module, self.spec))
            for module in self.model.modules()
            if isinstance(module, PreTrainedModel)
        ]
        configs = ConfigSwap(self.model, self.spec.implementation)
        self._undo.callback(configs.restore)
        configs.apply()
        for layer in self.layers.values():
            self._undo.callback(_set_spec, layer, vars(layer).get(SPEC_ATTRIBUTE))
            _set_spec(layer, self.spec)
        self._undo.callback(kind.swap(self.layers))
        for module, hook in hooks:
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            self._undo.callback(handle.remove)
        for module, _ in hooks:
            if check_outputs in module._forward_hooks.values():
                continue  # the model was loaded by an lctrain name
            handle = module.register_forward_hook(check_outputs, prepend=True, with_kwargs=True)
            self._undo.callback(handle.remove)

    def undo(self) -> None:
        """Removes the hooks and restores layers and configs, as far as `apply` has changed them."""
        self._undo.close()

    def describe(self) -> str:
        """Returns the names of the attention before and after the swap, as text."""
        return f"{self.previous} -> {self.spec.implementation}"

    def describe_options(self) -> str:
        """Returns the options of the attention layers as text."""
        return ", ".join(
            f"{name}={'as in the config' if value is None else repr(value)}"
            for name, value in self.spec.options().items()
        )

    def describe_kernels(self) -> str:
        """Returns as text which kernels would run the attention on the model's current device."""
        try:
            wide = {
                serving_backend(self.model, self.spec, width) for width in head_dims(self.model)
            }
        except ValueError as error:  # the model was moved; its next forward raises this error
            return f"none: {error}"
        if len(wide) > 1:
            return ", ".join(sorted(wide))
        backend, operation = wide.pop(), OPERATIONS.get(self.spec.kind)
        if backend != "hopper" or operation is None:
            return backend
        from lctrain.models.differential_v1 import FusedDiffLlamaAttention  # needs DiffLlama
        from lctrain_kernels.serving import serving

        _, dtype = device_and_dtype(self.model, self.spec)
        deterministic = torch.are_deterministic_algorithms_enabled() or self.spec.deterministic
        told = set()
        for layer in self.layers.values():
            head_dim = getattr(layer, "head_dim", 64)
            # In version 1 each branch has its own key, and a value is 2 D wide.
            version_1 = isinstance(layer, FusedDiffLlamaAttention)
            told.add(
                serving(
                    operation,
                    head_dim,
                    dtype,
                    deterministic=deterministic,
                    value_dim=2 * head_dim if version_1 else head_dim,
                    shared_k=not version_1,
                )
            )
        return "; ".join(sorted(told))


def serving_backend(model: nn.Module, spec: AttentionSpec, head_dim: int = 1) -> str:
    """Returns the backend that runs a model's attention on the model's current device.

    The dtype is that of `device_and_dtype`. Float32 weights cause no warning, since the model may
    run under autocast later.

    Args:
        model: A model on any device.
        spec: Options of its attention.
        head_dim: Head dim of the attention layers, as in `head_dims`.

    Raises:
        ValueError: if the backend that the spec names cannot run the model.
    """
    from lctrain.kernels import select_backend

    device, dtype = device_and_dtype(model, spec)
    named = backend_of(spec, device, dtype, head_dim)
    return select_backend(device, dtype, named, head_dim=head_dim, warn=False)


def device_and_dtype(model: nn.Module, spec: AttentionSpec) -> tuple[torch.device, torch.dtype]:
    """Returns the device and dtype in which a model's attention will run.

    The device is that of the first weight, or the GPU if `spec` names a backend while the model is
    still on the CPU. The dtype is autocast's if autocast is on, else that of the first weight.

    Args:
        model: A model on any device.
        spec: Options of its attention.
    """
    weight = next(model.parameters(), None)
    device, dtype = torch.device("cpu"), torch.float32
    if weight is not None and weight.device.type != "meta":
        device, dtype = weight.device, weight.dtype
    if spec.backend != "auto" and device.type == "cpu" and torch.cuda.is_available():
        device = torch.device("cuda")  # a model is often patched before it is moved
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return device, dtype


def _set_spec(layer: nn.Module, spec: AttentionSpec | None) -> None:
    """Sets the spec of an attention layer; None removes it.

    Before patch_model, only the layers of a model that was loaded by an lctrain name have a spec.
    """
    if spec is not None:
        setattr(layer, SPEC_ATTRIBUTE, spec)
    elif SPEC_ATTRIBUTE in vars(layer):
        delattr(layer, SPEC_ATTRIBUTE)
