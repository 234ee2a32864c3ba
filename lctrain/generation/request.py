"""Request: a prompt on its way to a completion."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Request:
    """A prompt with what has been generated for it, and its place in the cache.

    Attributes:
        index: Index of the completion.
        prompt: Token ids of the prompt.
        group: Number that equal prompts share.
        longest: Most tokens that it may store.
        seed: Seed of its draws.
        token_ids: Generated token ids that the host has read.
        log_probs: Log-probability of each.
        launched: Generated tokens, with those that the host has not read yet.
        pages: Pages that hold its keys and values.
        known: Tokens whose keys and values another request has stored, or will before this one.
        stored: Tokens whose keys and values are in the cache.
        owned: Tokens up to which it may store more without another page; 0 if that is not known.
        slot: Row of the request in tensors per running request; -1 while it waits.
        ended: Whether it has a completion. A token that a step made meanwhile is dropped.
    """

    index: int
    prompt: list[int]
    group: int
    longest: int
    seed: int
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    launched: int = 0
    pages: list[int] = field(default_factory=list)
    known: int = 0
    stored: int = 0
    owned: int = 0
    slot: int = -1
    ended: bool = False

    @property
    def tokens(self) -> list[int]:
        """Token ids of the prompt and of what has been read."""
        return self.prompt + self.token_ids
