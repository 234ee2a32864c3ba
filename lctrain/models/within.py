"""Transformers models inside any module: where they are, and patches of all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lctrain.models.patch import PatchHandle, patch_model
from lctrain.models.swap import Unpatchable

Paths = str | Sequence[str] | None


def find_models(module: nn.Module, paths: Paths = None) -> dict[str, Any]:
    """Returns the transformers models inside a module, by attribute path.

    A model inside another transformers model belongs to the outer one. Wrappers (torch.compile,
    PEFT, DistributedDataParallel, Fabric) are looked into.

    Args:
        module: A LightningModule, or any other module; "" is the path of the module itself.
        paths: Attribute paths, such as "policy.model" or "models.0", of the models or of modules
            that hold them; None for all models.

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
    """Returns what `find_models` does.

    Raises:
        ValueError: as `find_models`, and if there is no transformers model.
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
    """Patches of the models inside one module; also a context manager.

    Attributes:
        handles: PatchHandle of every model, by attribute path.
    """

    def __init__(self, handles: dict[str, PatchHandle]) -> None:
        self.handles = handles

    def unpatch(self) -> None:
        """Restores every model; outputs are bit-equal to before. Does nothing if called again."""
        for handle in reversed(self.handles.values()):
            handle.unpatch()

    def __repr__(self) -> str:
        return "\n".join(f"{path or '(the module)'}: {h!r}" for path, h in self.handles.items())


def patch_models(
    module: nn.Module, attention: str = "flash", models: Paths = None, **options: Any
) -> ModelPatches:
    """Swaps the attention of every transformers model inside a module for lctrain's kernels.

    For a module of your own, a Fabric module, or any training loop; with Lightning's Trainer use
    `lctrain.callbacks.PatchAttention`. Either all models are patched or none.

    Args:
        module: Holds the models.
        attention: Name of the attention, as in `lctrain.patch_model`.
        models: Attribute paths of the models to patch; None for all.
        **options: Options of `lctrain.patch_model`.

    Returns:
        A handle that lists what was swapped and undoes it.

    Raises:
        ValueError: if there is no model, or one cannot be patched; the message names the remedy.
    """
    patches = ModelPatches({})
    found = require_models(module, models)
    try:
        for path, model in found.items():
            patches.handles[path] = patch_model(model, attention, **options)
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
    """The object at an attribute path; numbers index lists."""
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
