"""LateHook: the input hook of a model that was given its attention by name.

`attn_implementation="lctrain_flash"` must mean what patch_model means. So a model that is built, or
set, to one of lctrain's names goes through the same checks and gets the same hooks. transformers
announces a model before it has layers; the checks run when the outermost model is complete, or, for
a class that never says so, in the first forward.
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

_threads = threading.local()


class LateHook:
    """An InputHook with the default options of patch_model.

    It does nothing while the model is patched, or its attention is set to something else.

    Attributes:
        implementation: Name of the attention.
        hook: The InputHook; None until the model was prepared.
    """

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self.hook: InputHook | None = None

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Returns the arguments to call the model with, or None to leave them."""
        if model.config._attn_implementation != self.implementation:
            if self.hook is not None and BOUNDARIES_ARGUMENT not in kwargs:
                self.hook.rest(model)
            return None
        if BOUNDARIES_ARGUMENT in kwargs or any(
            isinstance(hook, InputHook) for hook in model._forward_pre_hooks.values()
        ):
            return None
        if self.hook is None:
            prepare(model, self.implementation)
        assert self.hook is not None
        return self.hook(model, args, kwargs)


def begin(model: nn.Module, implementation: str) -> None:
    """Records that a model with this attention is being built; it has no layers yet."""
    attach_late_hook(model, implementation)
    building = [entry for entry in _building() if entry[0]() is not None]
    _building()[:] = [*building, (weakref.ref(model), implementation)]


def finish(model: nn.Module) -> None:
    """Checks and prepares a model that is complete, unless it is a part of one being built.

    Raises:
        ValueError: as patch_model does.
    """
    building = _building()
    place = next((i for i, entry in enumerate(building) if entry[0]() is model), None)
    if place is None:
        return
    implementation = building[place][1]
    del building[place:]  # with parts that never said that they were complete
    if not building:
        prepare(model, implementation, early=True)


def prepare(model: Any, implementation: str, early: bool = False) -> None:
    """Checks a model and gives it, and the models inside, hooks that are ready.

    Args:
        model: Complete with its layers.
        implementation: Name of the attention.
        early: Put off what runs layers on numbers until the first forward.

    Raises:
        ValueError: as patch_model does.
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
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            attach_late_hook(module, implementation).hook = KINDS[kind].hook(module, spec)


def attach_late_hook(model: nn.Module, implementation: str) -> LateHook:
    """Returns the LateHook of a model for an attention, and creates it if needed."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, LateHook) and hook.implementation == implementation:
            return hook
    late = LateHook(implementation)
    model.register_forward_pre_hook(late, with_kwargs=True)
    if check_outputs not in model._forward_hooks.values():
        model.register_forward_hook(check_outputs, with_kwargs=True)
    return late


def _building() -> list[tuple[Any, str]]:
    """(weak reference, implementation) of models that this thread is building, outermost first."""
    if not hasattr(_threads, "building"):
        _threads.building = []
    return _threads.building
