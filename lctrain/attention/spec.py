"""AttentionSpec: what a patched model's attention layers do, fixed when the model is patched."""

from dataclasses import dataclass
from typing import Any

ATTENTION_NAMES = {"flash": "lctrain_flash"}
"""attention= of patch_model -> the name registered with transformers."""


def is_patched(model: Any) -> bool:
    """Whether a model's attention is one of lctrain's, so that packed documents stay apart."""
    config = getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None) in ATTENTION_NAMES.values()


@dataclass(frozen=True)
class AttentionSpec:
    """The options of one patched model; every attention layer carries the same one.

    Attributes:
        kind: Which attention, a key of ATTENTION_NAMES.
        dropout: Probability of dropping an attention weight in training mode. None keeps what the
            model's config says.
        deterministic: Ask the kernels for a backward that gives the same bits in every run.
        backend: Which kernels serve, as in `lctrain.kernels`; a named one never falls back.
    """

    kind: str = "flash"
    dropout: float | None = None
    deterministic: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.kind not in ATTENTION_NAMES:
            raise ValueError(
                f"attention must be one of {', '.join(map(repr, ATTENTION_NAMES))}, "
                f"got {self.kind!r}. Name one that this version has."
            )
        number = isinstance(self.dropout, (int, float)) and not isinstance(self.dropout, bool)
        if self.dropout is not None and not (number and 0.0 <= self.dropout < 1.0):
            raise ValueError(
                f"dropout must be in [0, 1), or None for the model config's own, "
                f"got {self.dropout!r}. Pass 0.0 to turn it off."
            )
        if not isinstance(self.deterministic, bool):
            raise ValueError(
                f"deterministic must be True or False, got {self.deterministic!r}. Pass a bool."
            )
        if not isinstance(self.backend, str):
            raise ValueError(
                f"backend must be the name of a backend, got {self.backend!r}. "
                "Pass 'auto' to let the device decide."
            )

    @property
    def implementation(self) -> str:
        """The name under which transformers knows this attention."""
        return ATTENTION_NAMES[self.kind]
