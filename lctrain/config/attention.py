"""The settings of the attention patch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lctrain.limits import check_backend


@dataclass(frozen=True)
class AttentionConfig:
    """Options of the patched attention.

    Attributes:
        name: First argument of `lctrain.patch_model` after the model.
        dropout: Attention dropout in training. None takes the value of the model's configuration.
        deterministic: Whether the backward must give the same bits in every run.
        backend: Name of the kernels, as in `lctrain.kernels`. A named backend never falls back to
            another.
        fused: Whether training swaps norms, rotary embeddings, MLPs and residual additions as well.
        sliding_window: Keys that a query sees (flash only); None keeps the model's windows.
        chunk_size: Largest relative position (dual_chunk only, like all below; see
            `lctrain.attention.DualChunkSpec`); None for the trained window - 1.
        local_size: Tokens across a chunk's border that keep exact positions; None for an eighth of
            the window.
        scale: none, or yarn for sharper logits beyond the window.
        scale_coefficient: Strength of yarn.
        window: Length of the texts that the model was trained on, in tokens. None takes the value
            of its configuration.
    """

    name: str = "flash"
    dropout: float | None = None
    deterministic: bool = False
    backend: str = "auto"
    fused: bool = True
    sliding_window: int | None = None
    chunk_size: int | None = None
    local_size: int | None = None
    scale: str | None = None
    scale_coefficient: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        check_backend(self.backend, "attention.backend")

    def options(self) -> dict[str, Any]:
        """Options that are set, for `lctrain.patch_model`; those of other attentions included."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        del options["name"], options["fused"]
        return {name: value for name, value in options.items() if value is not None}
