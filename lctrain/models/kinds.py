"""KINDS: for each attention, the checks and changes that patch_model makes."""

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
    """The checks and changes for one attention.

    Attributes:
        fit: (model, spec) -> the spec with its None values filled in from the model. Raises a
            ValueError with a remedy if the model cannot have this attention.
        hook: (model, fitted spec) -> the input hook of a transformers model, or of one inside.
        swap: (attention layers by name) -> a function that undoes it. Changes layers that no
            attention function can serve.
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
