"""AttentionSwap: gives a model's attention layers lctrain's attention function, and back."""

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
"""Operation of the kernels behind each attention that has Hopper kernels."""


class AttentionSwap:
    """Swaps the attention of one model: see `lctrain.models.swap.Swap`.

    Attributes:
        model: The model.
        spec: The options that its layers carry, with what follows the model filled in.
        layers: Its attention layers by name.
        previous: Name of the attention that it had.

    Args:
        model: The model.
        spec: What the user asked for.

    Raises:
        ValueError: if the model or an option cannot be honoured; the message says what to do.
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
        """Swaps configs and layers, and puts hooks on the model and on those inside."""
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
            handle = module.register_forward_hook(check_outputs, with_kwargs=True)
            self._undo.callback(handle.remove)

    def undo(self) -> None:
        """Takes the hooks off, and gives layers and configs back: what `apply` has changed."""
        self._undo.close()

    def describe(self) -> str:
        """Returns the names of the attention, before and after."""
        return f"{self.previous} -> {self.spec.implementation}"

    def describe_options(self) -> str:
        """Returns the options that the layers carry."""
        return ", ".join(
            f"{name}={'as in the config' if value is None else repr(value)}"
            for name, value in self.spec.options().items()
        )

    def describe_kernels(self) -> str:
        """Returns which kernels serve the model where it is now."""
        try:
            wide = {
                serving_backend(self.model, self.spec, width) for width in head_dims(self.model)
            }
        except ValueError as error:  # the model has moved since; the next forward raises this
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
            version_1 = isinstance(layer, FusedDiffLlamaAttention)  # a k per branch, wide values
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
    """Returns the backend that will run the model on its current device.

    The dtype is autocast's where it is on. Weights in float32 cause no warning, since under
    autocast the calls have another dtype.

    Args:
        model: Model on any device.
        spec: Options of its attention.
        head_dim: Head dim of the layers in question, as in `head_dims`.

    Raises:
        ValueError: if the backend that the spec names cannot.
    """
    from lctrain.kernels import select_backend

    device, dtype = device_and_dtype(model, spec)
    named = backend_of(spec, device, dtype, head_dim)
    return select_backend(device, dtype, named, head_dim=head_dim, warn=False)


def device_and_dtype(model: nn.Module, spec: AttentionSpec) -> tuple[torch.device, torch.dtype]:
    """Returns where the model's attention runs now, and in which dtype: autocast's if it is on."""
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
    """Sets the options of a layer; a model that was loaded by name has some of its own."""
    if spec is not None:
        setattr(layer, SPEC_ATTRIBUTE, spec)
    elif SPEC_ATTRIBUTE in vars(layer):
        delattr(layer, SPEC_ATTRIBUTE)
