"""Reads and tokenizes the documents of an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lctrain.data import TokenizedDocument
from lctrain.data.documents import Documents, read_documents
from lctrain.data.mix_prepare import MixPreparation
from lctrain.data.prepare import set_readers

if TYPE_CHECKING:
    from lctrain.data.prepare import Preparation

SPLITS = ("held_out", "all")


def evaluation_documents(
    preparation: Preparation | MixPreparation, split: str
) -> list[TokenizedDocument]:
    """Returns the tokenized documents of a split, from the data module's cache if they are there.

    Args:
        preparation: Preparation of a PackedDataModule with a tokenizer.
        split: "held_out" for the documents that training on this data holds out; "all" for every
            document. Use "all" for data that the model was not trained on.

    Raises:
        ValueError: if the split has no document, there is no tokenizer, or the data cannot be read.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    tokenizer = preparation.given_tokenizer()
    if tokenizer is None:
        raise ValueError(
            "tokenizer must be the model's, got none. Name it, or leave data.tokenizer out of "
            "lctrain-eval to take the one that is stored with the model."
        )
    stores = [
        part.tokenize(documents, tokenizer)
        for part, documents in _read(preparation, split)
        if len(documents)
    ]
    if not stores:
        raise ValueError(
            "data must hold out at least one document with text, got none from "
            f"{preparation.source}. Raise data.held_out_fraction, use more data, or evaluate on "
            "all of it with split=all."
        )
    places = [(store, index) for store in stores for index in range(len(store))]
    return [
        TokenizedDocument(store.names[index], store.tokens(index).astype(np.int64), number)
        for number, (store, index) in enumerate(places)
    ]


def _read(
    preparation: Preparation | MixPreparation, split: str
) -> list[tuple[Preparation, Documents]]:
    """Returns the documents of a split, of every source and every further held-out set."""
    if isinstance(preparation, MixPreparation):
        parts = list(preparation.parts.values())
    else:
        parts = [preparation]
    found = [(part, _read_source(part, split)) for part in parts]
    if split == "held_out":
        readers = set_readers(
            preparation.held_out_sets, preparation.tokenizer, preparation.settings
        )
        found += [(reader, reader.read_all()) for reader in readers.values()]
    return found


def _read_source(preparation: Preparation, split: str) -> Documents:
    """Returns the documents of a split, with the same names as in the data module."""
    source = preparation.source
    label = type(source).__name__
    if split == "held_out":
        set_aside = source.load_held_out(preparation.cache_dir)
        if set_aside is not None:
            return read_documents(set_aside, f"{label}.held_out")
    documents = read_documents(source.load(preparation.cache_dir), label)
    return documents if split == "all" else preparation.split(documents)[1]
