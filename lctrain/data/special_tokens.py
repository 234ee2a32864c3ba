"""Finds the text of special tokens inside documents, such as `<|endoftext|>` on a web page.

If such a text became the special token, the author of a document could end the document, or begin a
turn of a conversation, in the middle of the text.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNWRITTEN = "\U000f0000" * 8  # private characters, which no document is expected to hold


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
    """Cuts a text inside each text of a special token, so that no part contains a whole one."""
    cuts = [match.start() + 1 for match in pattern.finditer(text) if len(match.group()) > 1]
    return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def holds_special(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> bool:
    """Whether token ids, [n], contain a special token other than the unknown token.

    Unigram vocabularies may list special tokens among their ordinary pieces. The tokenizer then
    returns a special token even with split_special_tokens=True.
    """
    special = set(special_ids(tokenizer).values()) - {tokenizer.unk_token_id}
    return bool(np.isin(ids, list(special)).any())


def literal_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Returns a `tokenizers.Tokenizer` for which the texts of special tokens are ordinary text.

    The result has the same ids as the given tokenizer. A vocabulary may list a special token among
    its ordinary pieces, as Unigram vocabularies do; that piece gets a name that no document
    contains. In a BPE vocabulary, a piece that merges can produce keeps its name.

    Args:
        tokenizer: A fast tokenizer of transformers.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    model = state["model"]
    kept = {tokenizer.unk_token, *("".join(pair) for pair in _merges(model))}
    names = {
        text: f"{_UNWRITTEN}{index}"
        for text, index in special_ids(tokenizer).items()
        if text and text not in kept
    }
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocabulary.items()}
    else:  # Unigram: pairs of a piece and its score
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    backend = Tokenizer.from_str(json.dumps(state))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def literal_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of `literal_backend` as a tokenizer of transformers.

    Pass split_special_tokens=True when it is called.

    Args:
        tokenizer: A fast tokenizer of transformers.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=literal_backend(tokenizer))


def _merges(model: dict[str, Any]) -> list[list[str]]:
    """Returns the merges of a BPE model, as pairs of pieces; none for other models."""
    merges = model.get("merges", [])
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
