"""Tokenizes documents in parallel; each document ends with the end token."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lctrain.data.documents import TokenStore
from lctrain.data.long_text import PIECE, encode_long
from lctrain.data.special_tokens import (
    break_up,
    holds_special,
    literal_tokenizer,
    special_pattern,
)
from lctrain.data.token_cache import map_groups
from lctrain.data.tokenizer import fingerprint_tokenizer, name_unencodable, tokens_around

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lctrain.data.documents import Documents

_RECIPE = "end-token-once-4"  # raise when tokenizing changes, so that old caches are not used
_SHOWN = 8 * PIECE  # characters of the shortest text that has a progress bar of its own


def tokenize(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    num_proc: int | None = None,
    special_tokens: str = "text",
) -> TokenStore:
    """Tokenizes documents, or loads their tokens from the cache.

    Special tokens that the tokenizer adds, such as a begin token, are kept. The end token is
    appended, unless the tokenizer adds it or has none. Documents without a token are left out.
    The memory needed is that of the longest document's text and tokens.

    Args:
        documents: Documents to tokenize.
        tokenizer: A transformers tokenizer.
        cache_dir: Cache folder. Tokens are kept in cache_dir/tokens, under a hash of the texts, the
            tokenizer and special_tokens.
        num_proc: Number of processes. None tokenizes in this process, where a fast tokenizer uses
            all cores.
        special_tokens: "text" keeps the text of a special token inside a document as text; "token"
            makes it the token.
    """
    rows = map_groups(
        documents,
        _Encoder(tokenizer, special_tokens),
        _features(),
        cache_dir,
        parts=(_RECIPE, fingerprint_tokenizer(tokenizer), special_tokens),
        num_proc=num_proc,
        description="Tokenizing",
    )
    numbers = rows.data.column("document").to_pylist()
    return TokenStore(rows, [documents.names[number] for number in numbers])


def tokenize_window(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, special_tokens: str
) -> TokenStore:
    """Tokenizes one window of a stream as `tokenize` does, but keeps the tokens in memory.

    Args:
        documents: Documents of the window.
        tokenizer: A transformers tokenizer.
        special_tokens: "text" keeps the text of a special token inside a document as text; "token"
            makes it the token.
    """
    from datasets import Dataset

    encoder = _Encoder(tokenizer, special_tokens)
    found: dict[str, list[Any]] = {name: [] for name in _features()}
    for group in documents.groups():
        bounds = {"first": [group.start], "stop": [group.stop]}
        for name, values in encoder(bounds, documents).items():
            found[name] += values
    dataset = Dataset.from_dict(found, _features())
    return TokenStore(dataset, [documents.names[row] for row in found["document"]])


def _features() -> Any:
    """Returns the columns of a dataset of tokens, with their types."""
    from datasets import Features, List, Value

    return Features(
        {
            "input_ids": List(Value("int32")),
            "document": Value("int64"),
            "special_texts": Value("int64"),
        }
    )


class _Encoder:
    """Encodes groups of documents to token ids, with begin and end tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_tokens: str) -> None:
        self._tokenizer = tokenizer
        self._split = special_tokens == "text"
        self._pattern = special_pattern(tokenizer)
        begin, end = tokens_around(tokenizer)
        stop = tokenizer.eos_token_id
        if stop is not None and (not end or end[-1] != stop):
            end = [*end, stop]
        self._begin, self._end = np.array(begin, np.int32), np.array(end, np.int32)

    def __call__(self, batch: dict[str, list[int]], documents: Documents) -> dict[str, list[Any]]:
        """Tokenizes one group; returns columns of rows, without documents that have no token."""
        group = range(batch["first"][0], batch["stop"][0])
        with name_unencodable(self._tokenizer):
            rows = [
                (row, *self.finish(text, ids))
                for row, text, ids in zip(group, *self.encode(documents, group), strict=True)
            ]
        kept = [row for row in rows if len(row[1])]
        numbers, input_ids, special_texts = zip(*kept, strict=True) if kept else ((), (), ())
        return {
            "input_ids": list(input_ids),
            "document": list(numbers),
            "special_texts": list(special_texts),
        }

    def encode(self, documents: Documents, group: range) -> tuple[list[str], list[np.ndarray]]:
        """Returns the texts and the token ids, [n] int32 each, of a range of documents.

        The ids are without begin and end tokens.
        """
        from datasets.utils import tqdm

        texts = documents.read(group)
        if len(texts) == 1 and len(texts[0]) > PIECE:
            (text,) = texts
            with tqdm(
                total=len(text),
                desc=f"Tokenizing {documents.names[group.start]}",
                unit="char",
                unit_scale=True,
                disable=len(text) < _SHOWN,
            ) as bar:
                return texts, [self._encode_long(self._tokenizer, text, bar.update)]
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=self._split,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # documents are longer than the model's length; they are split later
        )
        return texts, [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def finish(self, text: str, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Adds the begin and end tokens to the token ids of one text.

        Args:
            text: Text of the document.
            ids: [n] int32, token ids of the text.

        Returns:
            The token ids, and how many texts of special tokens the document contains.
        """
        found = 0 if self._pattern is None else sum(1 for _ in self._pattern.finditer(text))
        if self._pattern and found and self._split and holds_special(self._tokenizer, ids):
            ids = self._encode_literally(text, self._pattern)
        end = self._end
        if len(end) == 1 and len(ids) and ids[-1] == end[0]:
            end = end[:0]
        if len(ids) == 0 and len(end) == 0:
            return ids, found
        return np.concatenate([self._begin, ids, end]), found

    def _encode_literally(self, text: str, pattern: re.Pattern[str]) -> np.ndarray:
        """Returns the ids [n] int32 of a text whose special tokens are ordinary text."""
        if self._literal is not None:
            ids = self._encode_long(self._literal, text)
            if not holds_special(self._tokenizer, ids):
                return ids
        parts = break_up(text, pattern)
        return np.concatenate([self._encode_long(self._tokenizer, part) for part in parts])

    @cached_property
    def _literal(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer with special tokens as ordinary text; None if it is written in Python."""
        return literal_tokenizer(self._tokenizer) if self._tokenizer.is_fast else None

    def _encode_long(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        progress: Any = lambda characters: None,
    ) -> np.ndarray:
        return encode_long(tokenizer, text, split_special_tokens=self._split, progress=progress)
