"""longest_documents: chooses the documents of an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lctrain.instances import require_int, require_sequence

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
    require_sequence("documents", documents, "Pass tokenized documents.")
    require_int("documents", 1 if count is None else count, 1, "Use null for all of them.")
    longest = sorted(documents, key=lambda document: -len(document.input_ids))[:count]
    return [dataclasses.replace(one, input_ids=one.input_ids[:tokens]) for one in longest]
