"""KINDS: what patch_model does to a model for each kind of attention."""

from collections.abc import Callable
from typing import Any, NamedTuple

from lctrain.attention.spec import AttentionSpec
from lctrain.models.dual_chunk import DualChunkHook, fit_dual_chunk
from lctrain.models.inputs import InputHook


class Kind(NamedTuple):
    """One kind of attention.

    Attributes:
        fit: (model, spec) -> the spec with what it leaves to the model filled in. Raises a
            ValueError that says what to do if the model cannot have this attention.
        hook: (model, fitted spec) -> the input hook of a transformers model, or of one inside.
    """

    fit: Callable[[Any, Any], AttentionSpec]
    hook: Callable[[Any, Any], InputHook]


def _unchanged(model: Any, spec: AttentionSpec) -> AttentionSpec:
    return spec


KINDS = {
    "flash": Kind(_unchanged, InputHook),
    "dual_chunk": Kind(fit_dual_chunk, DualChunkHook),
}
