"""longest_documents: chooses the documents of an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lctrain.data import TokenizedDocument


def longest_documents(
    documents: Sequence[TokenizedDocument], count: int | None, tokens: int | None = None
) -> list[TokenizedDocument]:
    """Returns the longest documents, longest first. Documents of equal length keep their order.

    Args:
        documents: Tokenized documents.
        count: Largest number of documents; None for all.
        tokens: Number of tokens to keep of each document, from its beginning; None for all.

    Raises:
        ValueError: if `count` is below 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"documents must be at least 1, got {count}. Use null for all of them.")
    longest = sorted(documents, key=lambda document: -len(document.input_ids))[:count]
    return [dataclasses.replace(one, input_ids=one.input_ids[:tokens]) for one in longest]
