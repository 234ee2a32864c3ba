"""The text of special tokens inside documents, such as `<|endoftext|>` on a web page.

Taken for the token, it ends a document, or opens a turn of a conversation, where its author wants.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """A pattern that finds the text of special tokens; None if there are none."""
    texts = sorted(filter(None, map(str, tokenizer.all_special_tokens)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def break_up(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Cuts a text inside every special token, so that no part holds one whole."""
    cuts = [match.start() + 1 for match in pattern.finditer(text) if len(match.group()) > 1]
    return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def holds_special(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> bool:
    """Returns whether [n] ids contain a special token other than the one for unknown text.

    Some vocabularies hold them among their ordinary pieces (Unigram), where asking the tokenizer
    to split them does not help.
    """
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return bool(np.isin(ids, list(special)).any())
