"""KINDS: the functions by which patch_model checks and changes a model, by kind of attention."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from lctrain.attention.spec import AttentionSpec
from lctrain.models.differential_fit import fit_differential, fuse_layers
from lctrain.models.dual_chunk import DualChunkHook, fit_dual_chunk
from lctrain.models.frequencies import require_document_frequencies
from lctrain.models.inputs import InputHook


def _nothing() -> None:
    pass


def _keep(layers: dict[str, nn.Module]) -> Callable[[], None]:
    return _nothing


class Kind(NamedTuple):
    """The functions that patch_model calls for one kind of attention.

    Attributes:
        fit: Function (model, spec) -> the AttentionSpec with its None values filled in from the
            model. It raises a ValueError with a remedy if the model does not support this
            attention.
        hook: Function (model, filled-in AttentionSpec) -> the input hook, a forward pre-hook of a
            transformers model.
        swap: Function that gets the attention layers by name, and changes those that need another
            forward. It returns a function that undoes the change.
    """

    fit: Callable[[Any, Any], AttentionSpec]
    hook: Callable[[Any, Any], InputHook]
    swap: Callable[[dict[str, nn.Module]], Callable[[], None]] = _keep


def _fit_flash(model: Any, spec: AttentionSpec) -> AttentionSpec:
    require_document_frequencies(model)
    return spec


KINDS = {
    "flash": Kind(_fit_flash, InputHook),
    "dual_chunk": Kind(fit_dual_chunk, DualChunkHook),
    "differential": Kind(fit_differential, InputHook, fuse_layers),
}
