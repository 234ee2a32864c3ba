"""LateHook: prepares a model whose attention is selected by name, without patch_model.

A model that is loaded with `attn_implementation="lctrain_flash"`, or set to it later, gets the
checks and input hooks of patch_model with default options. transformers checks the name before the
model has layers. So lctrain's checks run later: when the outermost model is complete, or in the
first forward of a model whose class never calls `post_init`.
"""

import threading
import weakref
from typing import Any

from torch import nn

from lctrain.attention.forward import BOUNDARIES_ARGUMENT, SPEC_ATTRIBUTE
from lctrain.attention.spec import ATTENTION_NAMES, make_spec
from lctrain.models.architectures import attention_layers, require_supported
from lctrain.models.heads import check_outputs
from lctrain.models.inputs import InputHook
from lctrain.models.kinds import KINDS
from lctrain.models.unpadding import unpad_late, why_padded

_threads = threading.local()


class LateHook:
    """A forward pre-hook that checks the model at its first call, then runs an InputHook.

    It does nothing while the model is patched by patch_model, or while its attention has another
    name.

    Args:
        implementation: Name of the attention in transformers, such as "lctrain_flash".

    Attributes:
        implementation: Name of the attention in transformers.
        hook: The InputHook; None until `prepare` has checked the model.
    """

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self.hook: InputHook | None = None

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Returns the arguments for the model's forward; None leaves them unchanged."""
        if model.config._attn_implementation != self.implementation:
            if self.hook is not None and BOUNDARIES_ARGUMENT not in kwargs:
                self.hook.rest(model)
            return None
        if any(isinstance(hook, InputHook) for hook in model._forward_pre_hooks.values()):
            return None
        if BOUNDARIES_ARGUMENT in kwargs and self.hook is None:
            return None
        if self.hook is None:
            prepare(model, self.implementation)
        assert self.hook is not None
        return self.hook(model, args, kwargs)


def begin(model: nn.Module, implementation: str) -> None:
    """Records that transformers is building a model with lctrain's attention; it has no layers yet.

    Args:
        model: The model.
        implementation: Name of the attention in transformers.
    """
    attach_late_hook(model, implementation)
    building = [entry for entry in _building() if entry[0]() is not None]
    _building()[:] = [*building, (weakref.ref(model), implementation)]


def finish(model: nn.Module) -> None:
    """Checks and prepares a model that is complete, unless an outer model is still being built.

    Args:
        model: A model whose `post_init` has run.

    Raises:
        ValueError: if the model is not supported, as in patch_model.
    """
    building = _building()
    place = next((i for i, entry in enumerate(building) if entry[0]() is model), None)
    if place is None:
        return
    implementation = building[place][1]
    del building[place:]  # the model, and its inner models whose class never calls post_init
    if not building:
        prepare(model, implementation, early=True)


def prepare(model: Any, implementation: str, early: bool = False) -> None:
    """Checks a model, and registers input hooks on it and on the transformers models inside it.

    Args:
        model: A transformers model with its layers.
        implementation: Name of the attention in transformers.
        early: Whether to postpone checks that run layers on test inputs to the first forward.

    Raises:
        ValueError: if the model is not supported, as in patch_model.
    """
    from transformers import PreTrainedModel

    require_supported(model)
    kind = next(kind for kind, name in ATTENTION_NAMES.items() if name == implementation)
    attach_late_hook(model, implementation)
    if early and kind != "flash":
        return
    spec = KINDS[kind].fit(model, make_spec(kind))
    layers = attention_layers(model)
    for layer in layers.values():
        setattr(layer, SPEC_ATTRIBUTE, spec)
    KINDS[kind].swap(layers)
    unpads = why_padded(model) is None
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            hook = KINDS[kind].hook(module, spec)
            attach_late_hook(module, implementation).hook = hook
            if unpads:
                unpad_late(module, hook)


def attach_late_hook(model: nn.Module, implementation: str) -> LateHook:
    """Returns the LateHook of a model for one attention name, and registers it if needed.

    Args:
        model: The model.
        implementation: Name of the attention in transformers.
    """
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, LateHook) and hook.implementation == implementation:
            return hook
    late = LateHook(implementation)
    model.register_forward_pre_hook(late, with_kwargs=True)
    if check_outputs not in model._forward_hooks.values():
        model.register_forward_hook(check_outputs, prepend=True, with_kwargs=True)
    return late


def _building() -> list[tuple[Any, str]]:
    """Returns the models that this thread is building, the outermost first.

    Returns:
        A list of (weak reference to the model, name of its attention), to be changed in place.
    """
    if not hasattr(_threads, "building"):
        _threads.building = []
    return _threads.building
