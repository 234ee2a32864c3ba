"""The settings of the attention patch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lctrain.limits import check_backend


@dataclass(frozen=True)
class AttentionConfig:
    """Settings of lctrain's attention, which replaces the model's own attention.

    Attributes:
        name: Name of the attention: flash, dual_chunk or differential.
        dropout: Dropout probability of the attention in training. None takes the value of the
            model's configuration.
        deterministic: Whether the backward must give the same bits in every run.
        backend: Kernels to use: auto, hopper, triton or pytorch. A named backend never falls back
            to another.
        fused: Whether training also replaces norms, rotary embeddings, MLPs and residual additions
            by fused kernels.
        sliding_window: Number of keys that a query sees; None keeps the model's windows (flash
            only).
        batch_invariant: Whether rollouts of lctrain.generate have the bits of a training forward's
            log-probabilities; training then runs slower (flash only).
        chunk_size: Largest relative position; None takes the value of the model's configuration,
            else the trained window - 1 (dual_chunk only).
        local_size: Distance in tokens up to which keys of the previous chunk keep their exact
            relative positions. None takes the value of the model's configuration, else an eighth of
            the trained window (dual_chunk only).
        scale: Scale of the logits beyond the trained window: none, or yarn for sharper logits
            (dual_chunk only).
        scale_coefficient: Coefficient of the yarn scale (dual_chunk only).
        window: Length of the texts that the model was trained on, in tokens. None takes the value
            of the model's configuration (dual_chunk only).
    """

    name: str = "flash"
    dropout: float | None = None
    deterministic: bool = False
    backend: str = "auto"
    fused: bool = True
    sliding_window: int | None = None
    batch_invariant: bool = False
    chunk_size: int | None = None
    local_size: int | None = None
    scale: str | None = None
    scale_coefficient: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        check_backend(self.backend, "attention.backend")

    def options(self) -> dict[str, Any]:
        """Returns all options that are not None, as keywords of `lctrain.patch_model`."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        del options["name"], options["fused"]
        if not self.batch_invariant:  # an option of one attention
            del options["batch_invariant"]
        return {name: value for name, value in options.items() if value is not None}
