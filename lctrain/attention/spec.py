"""AttentionSpec: the options of a patched model's attention."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

SCALES = ("none", "yarn")


@dataclass(frozen=True)
class AttentionSpec:
    """Attention options of one patched model, the same in all of its attention layers.

    Each kind of attention ("flash", "dual_chunk", "differential") has a subclass with its own
    options.

    Attributes:
        kind: Name of the kind of attention, a key of ATTENTION_NAMES.
        dropout: Probability of dropping an attention weight in training mode. None keeps the value
            of the model's config.
        deterministic: Whether the backward must give the same bits in every run.
        backend: Backend of the kernels, as in `lctrain.kernels`. A named backend never falls back
            to another.
    """

    kind: ClassVar[str]

    dropout: float | None = None
    deterministic: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.dropout is not None and not (_is_number(self.dropout) and 0 <= self.dropout < 1):
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
        if self.deterministic and self.backend == "hopper" and self.kind != "flash":
            raise ValueError(
                f"backend='hopper' cannot be deterministic for attention={self.kind!r}: its "
                "programs add to the same gradients. Pass backend='triton', whose gradients have "
                "the same bits in every run."
            )

    @property
    def implementation(self) -> str:
        """Name of this attention in transformers, such as "lctrain_flash"."""
        return ATTENTION_NAMES[self.kind]

    def options(self) -> dict[str, Any]:
        """Returns the keyword arguments, without `kind`, that `make_spec` needs for this spec."""
        return asdict(self)


@dataclass(frozen=True)
class FlashSpec(AttentionSpec):
    """Options of softmax attention: causal or bidirectional, over all keys or a sliding window.

    Attributes:
        sliding_window: Number of keys that a query sees, its own key included. A layer with a
            shorter window keeps its own. None keeps the windows of the model.
        batch_invariant: Whether the bits of a token depend on its own document up to this token
            only, not on the batch, so that rollouts have the log-probabilities of a training
            forward. The portable kernels then compute the attention, without dropout.
    """

    kind: ClassVar[str] = "flash"

    sliding_window: int | None = None
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.sliding_window
        integer = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (integer and value >= 1):
            raise ValueError(
                f"sliding_window must be an int of at least 1, got {value!r}. Pass a number of "
                "tokens, or None to keep the model's own windows."
            )
        if not isinstance(self.batch_invariant, bool):
            raise ValueError(
                f"batch_invariant must be True or False, got {self.batch_invariant!r}. Pass a bool."
            )
        if self.batch_invariant and self.backend == "hopper":
            raise ValueError(
                "backend must be 'auto' or 'triton' with batch_invariant=True, got 'hopper', whose "
                "order of sums no decode kernel has. Pass backend='auto'."
            )


@dataclass(frozen=True)
class DualChunkSpec(AttentionSpec):
    """Options of dual chunk attention, which is causal and limits relative positions.

    No relative position exceeds `chunk_size`, so a model can read texts that are longer than its
    training texts. `deterministic` excludes the Hopper kernels, whose gradients may differ in their
    last bits between runs; backend="hopper" is then an error.

    Attributes:
        chunk_size: Largest relative position. None takes `dual_chunk_attention_config` of the
            model's config, or `window` - 1 if the config has none. With `window` - 1, documents of
            up to `window` tokens get the output of plain attention.
        local_size: Distance in tokens within which keys of the previous chunk keep their exact
            relative positions; keys farther back may get smaller ones. At least 0 and below
            `chunk_size`; a chunk holds `chunk_size` - `local_size` tokens. None takes
            (`chunk_size` + 1) // 8, unless `chunk_size` is None too and the model's config has a
            local_size.
        scale: "none", or "yarn": the logits of a document of n > `window` keys are multiplied by
            (`scale_coefficient` * ln(n / window) + 1)^2. With a key/value cache, n counts the keys
            so far, so the first tokens of a text get smaller factors than in a single forward pass.
        scale_coefficient: Coefficient of scale="yarn": 0.1 in YaRN and Qwen2.5-1M, 0.05 in
            ChunkLlama.
        window: Length of the texts that the model was trained on, in tokens. None takes the value
            of the model's config.
    """

    kind: ClassVar[str] = "dual_chunk"

    chunk_size: int | None = None
    local_size: int | None = None
    scale: str = "none"
    scale_coefficient: float = 0.1
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("chunk_size", 1), ("local_size", 0), ("window", 2)):
            value = getattr(self, name)
            integer = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (integer and value >= least):
                raise ValueError(
                    f"{name} must be an int of at least {least}, got {value!r}. Pass a number of "
                    "tokens, or None to follow the model's trained window."
                )
        sized = self.chunk_size is not None and self.local_size is not None
        if sized and self.chunk <= 0:
            raise ValueError(
                f"local_size must be below chunk_size ({self.chunk_size}), got {self.local_size}. "
                "Chunks hold chunk_size - local_size tokens; an eighth of the window is usual."
            )
        if self.scale not in SCALES:
            raise ValueError(
                f"scale must be one of {', '.join(map(repr, SCALES))}, got {self.scale!r}. 'none' "
                "leaves the logits as they are."
            )
        coefficient = self.scale_coefficient
        if not (_is_number(coefficient) and math.isfinite(coefficient) and coefficient >= 0):
            raise ValueError(
                f"scale_coefficient must be a number of at least 0, got {coefficient!r}. 0.1 is "
                "that of YaRN; scale='none' turns it off."
            )

    @property
    def chunk(self) -> int:
        """Number of tokens of a chunk, chunk_size - local_size; both sizes must be set."""
        assert self.chunk_size is not None
        assert self.local_size is not None
        return self.chunk_size - self.local_size


@dataclass(frozen=True)
class DifferentialSpec(AttentionSpec):
    """Options of differential attention, for models whose layers are differential.

    `deterministic` excludes the Hopper kernels, whose gradients may differ in their last bits
    between runs; backend="hopper" is then an error. Dropout draws one mask per branch.
    """

    kind: ClassVar[str] = "differential"


_SPECS: dict[str, type[AttentionSpec]] = {
    spec.kind: spec for spec in (FlashSpec, DualChunkSpec, DifferentialSpec)
}
ATTENTION_NAMES = {kind: f"lctrain_{kind}" for kind in _SPECS}
"""Value of patch_model's `attention` -> the name of that attention in transformers."""


def make_spec(kind: str = "flash", **options: Any) -> AttentionSpec:
    """Builds the AttentionSpec of one kind of attention.

    Args:
        kind: A key of ATTENTION_NAMES.
        **options: Fields of the AttentionSpec subclass of that kind.

    Raises:
        ValueError: if the kind or an option is unknown, an option belongs to another kind of
            attention, or a value is out of range.
    """
    if kind not in _SPECS:
        raise ValueError(
            f"attention must be one of {', '.join(map(repr, _SPECS))}, got {kind!r}. Name one "
            "that this version has."
        )
    known = _option_names(kind)
    for name in sorted(set(options) - set(known)):
        others = [repr(other) for other in _SPECS if name in _option_names(other)]
        raise ValueError(
            f"options of attention={kind!r} must be among {', '.join(known)}, got {name}. "
            + (
                f"It belongs to attention={' or '.join(others)}."
                if others
                else "Check the spelling."
            )
        )
    return _SPECS[kind](**options)


def is_patched(model: Any) -> bool:
    """Returns whether a model's config names an attention of lctrain.

    lctrain's attention keeps packed documents apart.
    """
    config = getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None) in ATTENTION_NAMES.values()


def _option_names(kind: str) -> tuple[str, ...]:
    return tuple(field.name for field in fields(_SPECS[kind]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
