"""Held-out documents and the tokenizer of a trainer's data module, for callbacks that evaluate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lctrain.batch_input import as_integers
from lctrain.data.documents import TokenizedDocument
from lctrain.data.tokenizer import load_tokenizer


def held_out_documents(
    trainer: pl.Trainer, given: Sequence[Sequence[int]] | None, callback: str
) -> list[TokenizedDocument]:
    """Returns the documents that a callback evaluates.

    Args:
        trainer: The Trainer.
        given: Documents as sequences of token ids; None for those of the data module.
        callback: Name of the callback, for messages.

    Raises:
        ValueError: if none are given and the data module has no method `held_out_documents()`.
    """
    if given is not None:
        return [
            TokenizedDocument(
                f"document {index}", as_integers(f"held_out[{index}]", ids).numpy(), index
            )
            for index, ids in enumerate(given)
        ]
    find = getattr(getattr(trainer, "datamodule", None), "held_out_documents", None)
    if find is None:
        raise ValueError(
            f"{callback} needs held-out documents, got no data module that has them. Pass "
            "held_out=, a list of token ids per document, or train with PackedDataModule."
        )
    documents: list[TokenizedDocument] = find()
    return documents


def tokenizer_of(trainer: pl.Trainer) -> Any:
    """Returns the tokenizer of the data module, loaded if it is a name; None without one."""
    tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(os.fspath(tokenizer))
    return tokenizer
