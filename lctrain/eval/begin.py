"""The begin token in evaluation: models that were trained with one expect it in every window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lctrain.data.tokenizer import tokens_around


@dataclass(frozen=True)
class BeginTokens:
    """Tokens with which windows begin.

    Attributes:
        tokens: Token ids, one as a rule; none for tokenizers without a begin token.
        every_window: Whether each window begins with them; otherwise only those do that begin
            where a document does.
    """

    tokens: tuple[int, ...] = ()
    every_window: bool = True


NO_BEGIN = BeginTokens()


def begin_tokens(tokenizer: Any, option: bool | None) -> BeginTokens:
    """Returns the tokens with which windows begin, for a tokenizer.

    Args:
        tokenizer: A transformers tokenizer.
        option: None: every window begins with the tokens that the tokenizer adds before a text, if
            any. True: with these, else with the begin token. False: windows are parts of documents,
            unchanged.

    Raises:
        ValueError: if `option` is true, and there is no begin token.
    """
    added = tuple(tokens_around(tokenizer)[0])
    if added or not option:
        return BeginTokens(added, every_window=option is not False)
    if tokenizer.bos_token_id is None:
        raise ValueError(
            "begin_token must be null or false for a tokenizer without a begin token, got true. "
            "Leave it out."
        )
    return BeginTokens((tokenizer.bos_token_id,))
