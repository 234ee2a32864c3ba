"""preparation_of: chooses how the documents that a user passes become rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lctrain.config import DataSettings
from lctrain.data.given import DatasetSource, TokenPreparation, holds_texts
from lctrain.data.mix import SourceMix, named_sets
from lctrain.data.mix_prepare import MixPreparation
from lctrain.data.prepare import Preparation
from lctrain.data.prepared import OWN_SET
from lctrain.data.sources import Source, StdlibSource
from lctrain.limits import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnyPreparation = Preparation | MixPreparation | TokenPreparation


def preparation_of(
    source: Any,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None,
    settings: DataSettings,
    held_out: Any = None,
) -> AnyPreparation:
    """Returns the object whose `run` prepares packed rows from the data that a user passed.

    Args:
        source: A source, a mix, texts, token ids or packed rows, as `PackedDataModule` takes them.
            None reads Python's standard library.
        tokenizer: A tokenizer of transformers, or its name or path; None trains one.
        settings: Settings of the data module.
        held_out: Documents to hold out, or held-out sets by name, as `PackedDataModule` takes them.

    Raises:
        ValueError: if the arguments do not fit together.
    """
    sets = dict(held_out) if isinstance(held_out, Mapping) else {}
    single = None if isinstance(held_out, Mapping) else held_out
    require(
        OWN_SET not in sets,
        f"held_out must not name a set {OWN_SET!r}, which is the held-out part of the data. Choose "
        "another name.",
    )
    if source is None:
        source = StdlibSource()
    is_source = isinstance(source, (Source, SourceMix))
    if single is not None and is_source:
        raise ValueError(
            "held_out must come with a dataset, got it with a Source. Set the source's own "
            "held-out files, pass held-out sets by name, or pass a dataset."
        )
    if is_source or holds_texts(source):
        named = named_sets({name: _as_source(value) for name, value in sets.items()})
        if isinstance(source, SourceMix):
            return MixPreparation(
                source=source, tokenizer=tokenizer, settings=settings, held_out_sets=named
            )
        if not is_source:
            source = DatasetSource(dataset=source, held_out=single)
        return Preparation(
            source=source, tokenizer=tokenizer, settings=settings, held_out_sets=named
        )
    return TokenPreparation(
        dataset=source,
        held_out=single,
        tokenizer=tokenizer,
        settings=settings,
        held_out_sets=sets,
    )


def _as_source(value: Any) -> Any:
    """Returns texts wrapped in a source; another value is returned itself."""
    return DatasetSource(dataset=value) if holds_texts(value) else value
