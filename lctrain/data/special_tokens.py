"""Finds the text of special tokens inside documents, such as `<|endoftext|>` on a web page.

If such a text became the special token, the author of a document could end the document, or begin a
turn of a conversation, in the middle of the text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Returns the ids of all special tokens by their texts.

    A vocabulary may mark more tokens as special than the tokenizer has names for (bos_token, ...),
    such as Llama 3's `<|eot_id|>`.
    """
    named = zip(map(str, tokenizer.all_special_tokens), tokenizer.all_special_ids, strict=True)
    added = tokenizer.added_tokens_decoder.items()
    return dict(named) | {token.content: index for index, token in added if token.special}


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Returns a pattern that matches the texts of all special tokens; None if there are none."""
    texts = sorted(filter(None, special_ids(tokenizer)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def break_up(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Cuts a text inside every special token's text, so that no part contains a whole one."""
    cuts = [match.start() + 1 for match in pattern.finditer(text) if len(match.group()) > 1]
    return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def holds_special(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> bool:
    """Whether token ids, [n], contain a special token other than the unknown token.

    Unigram vocabularies may list special tokens among their ordinary pieces. The tokenizer then
    returns a special token even with split_special_tokens=True.
    """
    special = set(special_ids(tokenizer).values()) - {tokenizer.unk_token_id}
    return bool(np.isin(ids, list(special)).any())
