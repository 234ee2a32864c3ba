"""Finds the transformers models inside any module, and patches all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lctrain.models.direct_calls import CallSwap, skips_hooks
from lctrain.models.patch import PatchHandle, patch_model
from lctrain.models.swap import Unpatchable

Paths = str | Sequence[str] | None


def find_models(module: nn.Module, paths: Paths = None) -> dict[str, Any]:
    """Returns the transformers models inside a module, by attribute path.

    Models inside wrappers (torch.compile, PEFT, DistributedDataParallel, Fabric) are found. A model
    inside another transformers model is a part of it and is not returned.

    Args:
        module: A LightningModule or any other module. If it is a transformers model itself, its
            path is "".
        paths: Attribute paths of models, or of modules that contain models, such as "policy.model"
            or "models.0"; None finds all models.

    Raises:
        ValueError: if a path does not exist or holds no transformers model.
    """
    if paths is None:
        return dict(_outermost(module, ""))
    found: dict[str, Any] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        below = dict(_outermost(_resolve(module, path), path))
        if not below:
            raise ValueError(
                f"models must name transformers models in {type(module).__name__}, got {path!r}, "
                f"which holds none. {_known(module)}"
            )
        found |= below
    return found


def require_models(module: nn.Module, paths: Paths = None) -> dict[str, Any]:
    """Returns the result of `find_models`, and raises a ValueError if it is empty.

    Args:
        module: A LightningModule or any other module.
        paths: Attribute paths, as in `find_models`; None finds all models.

    Raises:
        ValueError: if there is no transformers model, or a path does not exist or holds none.
    """
    found = find_models(module, paths)
    if not found:
        raise ValueError(
            f"{type(module).__name__} must hold a transformers model, got none among its "
            "submodules. Assign the model to an attribute of the module, or name the place of a "
            "hidden one by models='attribute.path'."
        )
    return found


class ModelPatches(Unpatchable):
    """Holds the patches of the models inside one module, and undoes them.

    It is also a context manager, which undoes the patches at its end.

    Attributes:
        handles: PatchHandle of every patched model, by attribute path.
    """

    def __init__(self, handles: dict[str, PatchHandle]) -> None:
        self.handles = handles

    def unpatch(self) -> None:
        """Restores every model, whose outputs then have the same bits as before the patch.

        A second call does nothing.
        """
        for handle in reversed(self.handles.values()):
            handle.unpatch()

    def __repr__(self) -> str:
        return "\n".join(f"{path or '(the module)'}: {h!r}" for path, h in self.handles.items())


def patch_models(
    module: nn.Module, attention: str = "flash", models: Paths = None, **options: Any
) -> ModelPatches:
    """Replaces the attention of all transformers models inside a module by lctrain's.

    Use this function with Fabric or a training loop of your own. With Lightning's Trainer, use
    `lctrain.callbacks.PatchAttention`. If a model cannot be patched, all models are restored.

    Args:
        module: The module that holds the models.
        attention: Name of the attention, as in `lctrain.patch_model`.
        models: Attribute paths of the models to patch, as in `find_models`; None patches all
            models.
        **options: Further keyword arguments of `lctrain.patch_model`.

    Returns:
        A handle that lists the changes and undoes them.

    Raises:
        ValueError: if there is no model, or one cannot be patched; the message names the remedy.
    """
    patches = ModelPatches({})
    found = require_models(module, models)
    try:
        for path, model in found.items():
            patches.handles[path] = patch_model(model, attention, **options)
            if skips_hooks(module):
                patches.handles[path].add(CallSwap(model))
    except ValueError as error:
        patches.unpatch()
        if len(found) == 1:
            raise
        failed = list(found)[len(patches.handles)]
        others = ", ".join(repr(other) for other in found if other != failed)
        raise ValueError(
            f"models must all take attention={attention!r} with the same options, got "
            f"{failed!r}, which cannot: {error} Name the models to patch (models={others}), and "
            "give the others a patch of their own."
        ) from error
    return patches


def _outermost(module: Any, path: str) -> Iterator[tuple[str, Any]]:
    from transformers import PreTrainedModel

    seen: set[int] = set()

    def walk(part: nn.Module, place: str) -> Iterator[tuple[str, Any]]:
        if id(part) in seen:
            return
        seen.add(id(part))
        if isinstance(part, PreTrainedModel):
            yield place, part
            return
        for name, child in part.named_children():
            yield from walk(child, f"{place}.{name}" if place else name)

    parts = {path: module}
    if isinstance(module, (list, tuple)):
        parts = {f"{path}.{index}": part for index, part in enumerate(module)}
    for place, part in parts.items():
        if isinstance(part, nn.Module):
            yield from walk(part, place)


def _resolve(module: nn.Module, path: str) -> Any:
    """Returns the object at an attribute path, in which a number is the index of a list.

    Raises:
        ValueError: if there is no such object.
    """
    target: Any = module
    for name in path.split(".") if path else ():
        if name.isdigit() and isinstance(target, (list, tuple)):
            target = target[int(name)] if int(name) < len(target) else None
        else:
            target = target.get(name) if isinstance(target, dict) else getattr(target, name, None)
        if target is None:
            raise ValueError(
                f"models must be attribute paths in {type(module).__name__}, got {path!r}, which "
                f"does not exist. {_known(module)}"
            )
    return target


def _known(module: nn.Module) -> str:
    paths = ", ".join(repr(path) for path in find_models(module))
    return f"It holds transformers models at {paths}." if paths else "It holds no such model."
