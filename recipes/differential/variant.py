"""The models that the recipe compares, as overrides of `experiment=differential`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One of the compared models.

    Attributes:
        name: Name in tables and file names.
        title: Name in plots.
        attention: Attention of `lctrain.patch_model`.
        overrides: Hydra overrides that turn the plain model into this one.
    """

    name: str
    title: str
    attention: str
    overrides: tuple[str, ...]


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("plain", "plain Llama", "flash", ()),
        Variant(
            "v1",
            "Differential Transformer",
            "differential",
            ("model=diff_llama", "attention=differential"),
        ),
        Variant(
            "v2",
            "Differential Transformer V2",
            "differential",
            ("model=llama_diff_v2", "attention=differential"),
        ),
    )
}
