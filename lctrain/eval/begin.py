"""BeginTokens: the begin tokens (such as <s>) that precede windows of text in an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lctrain.data.tokenizer import tokens_around


@dataclass(frozen=True)
class BeginTokens:
    """The begin tokens, such as <s>, of evaluation windows.

    A model that was trained with a begin token before every text expects one in every window.

    Attributes:
        tokens: Token ids, usually one; empty for a tokenizer without a begin token.
        every_window: Whether every window begins with the tokens. If False, only the first window
            of a document may begin with them, as part of the document.
    """

    tokens: tuple[int, ...] = ()
    every_window: bool = True


NO_BEGIN = BeginTokens()


def begin_tokens(tokenizer: Any, option: bool | None) -> BeginTokens:
    """Returns the begin tokens of evaluation windows for a tokenizer.

    Args:
        tokenizer: A transformers tokenizer.
        option: None begins every window with the tokens that the tokenizer adds before a text, if
            it adds any. True does the same, and uses the begin token if the tokenizer adds none.
            False adds no tokens to windows.

    Raises:
        ValueError: if `option` is true and the tokenizer has no begin token.
    """
    if not callable(tokenizer):
        raise TypeError(
            f"tokenizer must be a tokenizer of transformers, got {type(tokenizer).__name__}. Pass "
            "AutoTokenizer.from_pretrained(...)."
        )
    added = tuple(tokens_around(tokenizer)[0])
    if added or not option:
        return BeginTokens(added, every_window=option is not False)
    if tokenizer.bos_token_id is None:
        raise ValueError(
            "begin_token must be null or false for a tokenizer without a begin token, got true. "
            "Leave it out."
        )
    return BeginTokens((tokenizer.bos_token_id,))
