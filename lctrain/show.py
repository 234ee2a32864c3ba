"""Prints training documents with the tokens that are trained on in colour."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.data import PackedDataModule
from lctrain.pluralize import pluralize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GREEN, _DIM, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def show_documents(datamodule: PackedDataModule, count: int, colour: bool | None = None) -> None:
    """Prints the first documents of the training rows, in the order of training.

    Args:
        datamodule: Data module that is set up.
        count: Number of documents to print; all of one epoch if there are fewer.
        colour: Whether to print trained tokens in green and others dim; False puts trained tokens
            between brackets. None decides by the terminal and the variables NO_COLOR and TERM.
    """
    if colour is None:
        colour = has_colours()
    loader = datamodule.train_dataloader()
    found = documents_of(loader, len(loader), datamodule.tokenizer, colour)
    for _, text in zip(range(count), found, strict=False):
        print(text, flush=True)
    legend = f"{_GREEN}trained on{_PLAIN}" if colour else "⟦trained on⟧"
    print(f"{legend}; training rows: {datamodule.packing_report}", flush=True)


def has_colours() -> bool:
    """Returns whether the output is a terminal that shows colours, which the user wants."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


def documents_of(
    batches: Any, count: int, tokenizer: PreTrainedTokenizerBase, colour: bool
) -> Iterator[str]:
    """Yields the documents in the first `count` batches as texts with a heading."""
    for _, batch in zip(range(count), batches, strict=False):
        bounds = batch.cu_seqlens.tolist()
        for number, (begin, end) in enumerate(pairwise(bounds)):
            name = batch.names[number] if batch.names else f"document {number}"
            yield describe(batch, begin, end, name, tokenizer, colour)


def describe(
    batch: PackedBatch,
    begin: int,
    end: int,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    colour: bool,
) -> str:
    """Returns one document of a batch as text.

    Args:
        batch: A batch on the CPU.
        begin: First token of the document in the batch.
        end: Token after the last one.
        name: Name of the document.
        tokenizer: Tokenizer of the token ids.
        colour: Whether to mark trained tokens by colour, instead of brackets.
    """
    ids = batch.input_ids[0, begin:end].tolist()
    labels = batch.labels[0, begin:end].tolist()
    trained = [False, *(label != IGNORE_INDEX for label in labels[:-1])]  # labels are shifted
    parts = []
    first = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or trained[stop] != trained[first]:
            text = _visible(str(tokenizer.decode(ids[first:stop])))
            parts.append(_paint(text, trained[first], colour))
            first = stop
    heading = f"--- {name}: {pluralize(len(ids), 'token')}, {sum(trained):,} trained on"
    return f"{heading}\n{''.join(parts)}\n"


def _paint(text: str, trained: bool, colour: bool) -> str:
    if colour:
        return f"{_GREEN if trained else _DIM}{text}{_PLAIN}"
    return f"⟦{text}⟧" if trained else text


def _visible(text: str) -> str:
    """Returns a text whose control characters, which could command the terminal, are escaped."""
    return _CONTROL.sub(lambda match: repr(match.group())[1:-1], text)
