"""Tokenizes a long text in pieces, with the same tokens as tokenizing the whole text at once.

A tokenizer needs about fifty times the memory of its text, so long texts are tokenized in
overlapping windows. Two windows are joined at a position where both have the same tokens, at the
same characters, for 64 tokens on either side. A tokenizer's result at a word border depends on few
characters around it, and each window holds many more. So the tokens of the left window before the
join, and those of the right window after it, are the tokens of the whole text.

A tokenizer written in Python does not return the characters of its tokens. For such a tokenizer,
the text is cut at a line break for which tokenizing both sides separately and together gives the
same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 2**19  # characters
_OVERLAP = 2**13  # characters that two windows share
_AGREE = 64  # tokens on either side of a join that must be the same in both
_CANDIDATES = 256  # positions that are tried for a join
_AROUND = 2**11  # characters on either side of a cut


def encode_long(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    split_special_tokens: bool,
    piece: int = PIECE,
    progress: Callable[[int], Any] = lambda characters: None,
) -> np.ndarray:
    """Tokenizes one text without the begin and end tokens that the tokenizer adds.

    If two windows cannot be joined, for example inside a word of millions of letters, the window
    grows until they can, or until it holds the whole text.

    Args:
        tokenizer: A transformers tokenizer.
        text: Text of any length.
        split_special_tokens: Whether to tokenize the text of special tokens as ordinary text.
        piece: Number of characters in a window.
        progress: Called with the number of characters that were finished since the last call.

    Returns:
        Token ids, [n] int32.
    """

    def encode(part: str, **options: Any) -> Any:
        return tokenizer(
            part,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # longer than the model's length; it is split later
            **options,
        )

    if tokenizer.is_fast:
        pieces = _windows(text, encode, piece, progress)
    else:
        pieces = _parts(text, lambda part: encode(part)["input_ids"], piece, progress)
    return np.concatenate([np.empty(0, np.int32), *pieces])


def _windows(
    text: str, encode: Callable[..., Any], piece: int, progress: Callable[[int], Any]
) -> Iterator[np.ndarray]:
    def window(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        encoded = encode(text[start:stop], return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        places = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return ids, places + start

    start, stop = 0, min(piece, len(text))
    left = window(start, stop)
    first = 0  # index of the left window's first token that has not been yielded
    while stop < len(text):
        next_start = max(start, stop - min(_OVERLAP, piece // 2))
        next_stop = min(next_start + piece, len(text))
        right = window(next_start, next_stop)
        join = _agreement(left, right)
        if join is None:
            stop = min(stop + (stop - start), len(text))
            left = window(start, stop)  # its first tokens stay as they are
            continue
        yield left[0][first : join[0]]
        progress(next_start - start)
        start, stop, left, first = next_start, next_stop, right, join[1]
    yield left[0][first:]
    progress(len(text) - start)


def _agreement(
    left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]
) -> tuple[int, int] | None:
    """Finds a token at which to go over from one window of a text to the next, which overlaps it.

    The _AGREE tokens before it, and as many from it on, are the same in both windows.

    Args:
        left: Token ids [n] of a window, and the characters [start, stop) of each token, [n, 2],
            counted from the start of the text.
        right: The same of the next window.

    Returns:
        The index of the token in the left and in the right window; None if there is no join.
    """
    (ids_l, places_l), (ids_r, places_r) = left, right
    if len(ids_r) == 0 or len(ids_l) == 0:
        return None
    from_l = int(np.searchsorted(places_l[:, 0], places_r[0, 0]))
    to_r = int(np.searchsorted(places_r[:, 0], places_l[-1, 1]))
    _, common_l, common_r = np.intersect1d(
        places_l[from_l:, 0], places_r[:to_r, 0], return_indices=True
    )
    order = np.argsort(np.abs(common_r - to_r // 2))[:_CANDIDATES]  # from the middle outwards
    for a, b in zip((common_l[order] + from_l).tolist(), common_r[order].tolist(), strict=True):
        if min(a, b, len(ids_l) - a, len(ids_r) - b) < _AGREE:
            continue
        near_l, near_r = slice(a - _AGREE, a + _AGREE), slice(b - _AGREE, b + _AGREE)
        if (ids_l[near_l] == ids_r[near_r]).all() and (places_l[near_l] == places_r[near_r]).all():
            return a, b
    return None


def _parts(
    text: str, encode: Callable[[str], list[int]], piece: int, progress: Callable[[int], Any]
) -> Iterator[np.ndarray]:
    start = 0
    while start < len(text):
        stop = _cut(text, start, start + piece, encode)
        yield np.array(encode(text[start:stop]), dtype=np.int32)
        progress(stop - start)
        start = stop


def _cut(text: str, start: int, stop: int, encode: Callable[[str], list[int]]) -> int:
    """Returns the end of the piece that begins at `start`.

    The end is the last line break before `stop` at which a cut does not change the tokens, else
    the first such line break after `stop`, else the end of the text.
    """
    before = text.rfind("\n", start, stop) + 1
    while stop < len(text):
        place = before if before > start else text.find("\n", stop) + 1
        if place == 0:
            break
        left, right = text[max(start, place - _AROUND) : place], text[place : place + _AROUND]
        if encode(left) + encode(right) == encode(left + right):
            return place
        before, stop = start, max(stop, place)
    return len(text)
