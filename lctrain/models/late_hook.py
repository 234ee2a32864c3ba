"""LateHook: the input hook of a model that was loaded by the name of its attention."""

from typing import Any

from torch import nn

from lctrain.attention.forward import BOUNDARIES_ARGUMENT, SPEC_ATTRIBUTE
from lctrain.attention.spec import ATTENTION_NAMES, make_spec
from lctrain.models.architectures import attention_layers, require_supported
from lctrain.models.inputs import InputHook
from lctrain.models.kinds import KINDS


class LateHook:
    """Checks and prepares its model in the first forward, then does what the InputHook does.

    It is attached while the model is being built, when there are no layers yet. The layers get the
    default options; patch_model is for others. It does nothing while the model is patched, or its
    attention is set to something else.
    """

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self.hook: InputHook | None = None

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Returns the arguments to call the model with, or None to leave them."""
        if (
            model.config._attn_implementation != self.implementation
            or BOUNDARIES_ARGUMENT in kwargs
            or any(isinstance(hook, InputHook) for hook in model._forward_pre_hooks.values())
        ):
            return None
        if self.hook is None:
            self.hook = self._prepare(model)
        return self.hook(model, args, kwargs)

    def _prepare(self, model: Any) -> InputHook:
        kind = next(kind for kind, name in ATTENTION_NAMES.items() if name == self.implementation)
        require_supported(model)
        spec = KINDS[kind].fit(model, make_spec(kind))
        layers = attention_layers(model)
        for layer in layers.values():
            setattr(layer, SPEC_ATTRIBUTE, spec)
        KINDS[kind].swap(layers)
        return KINDS[kind].hook(model, spec)


def attach_late_hook(model: nn.Module, implementation: str) -> None:
    """Gives a model under construction its LateHook. Harmless if done before."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, LateHook) and hook.implementation == implementation:
            return
    model.register_forward_pre_hook(LateHook(implementation), with_kwargs=True)
