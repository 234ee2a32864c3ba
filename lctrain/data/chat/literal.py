"""LiteralEncoder: tokenizes text in which some texts of special tokens are ordinary text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lctrain.data.special_tokens import literal_backend, special_ids, special_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIRST, _LAST = 0x100000, 0x10FFFD  # supplementary private use area B


class LiteralEncoder:
    """Encodes a text in which some "<|im_end|>" are special tokens and others are ordinary text.

    The encoder uses a copy of the tokenizer that reads special tokens as ordinary text. In this
    copy, each special token has a substitute: an added token of one private-use Unicode character,
    which replaces the special token in the text. So the tokenizer sees the whole text at once.
    Tokenizing the parts of a text separately would give other tokens: many tokenizers put a space
    ("▁") before each part.

    Args:
        tokenizer: A fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from tokenizers import AddedToken

        self._backend: Any = literal_backend(tokenizer)
        self._pattern = special_pattern(tokenizer)
        known = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        ids = special_ids(tokenizer)
        self._stand_ins = {text: chr(_FIRST + n) for n, text in enumerate(filter(None, ids))}
        assert _FIRST + len(self._stand_ins) <= _LAST
        self._backend.add_tokens(
            [
                AddedToken(
                    stand_in,
                    lstrip=text in known and known[text].lstrip,
                    rstrip=text in known and known[text].rstrip,
                    single_word=text in known and known[text].single_word,
                    normalized=False,
                    special=False,
                )
                for text, stand_in in self._stand_ins.items()
            ]
        )
        self._special = np.array(sorted(set(ids.values()) - {tokenizer.unk_token_id}))
        self._ids = {
            self._backend.token_to_id(stand_in): ids[text]
            for text, stand_in in self._stand_ins.items()
        }

    def encode(self, text: str, cuts: Sequence[int]) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns token ids [n] int32, and (begin, end) characters of each token, [n, 2] int64.

        Args:
            text: Text without characters of Unicode's private use area B.
            cuts: Positions in rising order. The text of a special token is ordinary text if one of
                these positions lies inside it.

        Returns:
            The ids and characters; None if the tokenizer produces a special token even from
            ordinary text, as a BPE vocabulary may whose merges produce one.
        """
        bounds = np.asarray(cuts, np.int64)
        pieces: list[str] = []
        origin: list[np.ndarray] = []  # position in the text of each character of the pieces
        done = count = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            begin, end = match.span()
            if np.searchsorted(bounds, begin, "right") < np.searchsorted(bounds, end, "left"):
                continue
            pieces += text[done:begin], self._stand_ins[match.group()]
            origin += np.arange(done, begin), np.array([begin])
            done, count = end, count + 1
        pieces.append(text[done:])
        origin.append(np.arange(done, len(text) + 1))
        encoded = self._backend.encode("".join(pieces), add_special_tokens=False)
        ids = np.array(encoded.ids, dtype=np.int64)
        taken = np.isin(ids, np.array(list(self._ids), dtype=np.int64))
        if int(taken.sum()) != count or np.isin(ids, self._special).any():
            return None
        ids[taken] = [self._ids[index] for index in ids[taken].tolist()]
        places = np.concatenate(origin)[np.array(encoded.offsets, np.int64).reshape(-1, 2)]
        return ids.astype(np.int32), places
