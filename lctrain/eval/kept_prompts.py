"""KeptPrompts: tokenized prompts that several methods, or several evaluations, read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable

from lctrain.eval.ahead import called_aside
from lctrain.eval.prompt import TokenPrompt

MOST_TOKENS = 2**26
"""Most tokens of the kept prompts; with their texts these need less than 1 GiB."""


class KeptPrompts:
    """Prompts by key. Threads may use them at the same time. A copy begins without prompts.

    Args:
        most_tokens: Most tokens of all prompts together. Prompts beyond it are not kept.
    """

    def __init__(self, most_tokens: int = MOST_TOKENS) -> None:
        self.most_tokens = most_tokens
        self._tokens = 0
        self._prompts: dict[Hashable, TokenPrompt] = {}
        self._lock = threading.Lock()
        self._settle: Callable[[], None] | None = None

    def __reduce__(self) -> tuple[type[KeptPrompts], tuple[int]]:
        """Lets tasks be copied, and pickled for ranks that are spawned; a lock cannot be."""
        return KeptPrompts, (self.most_tokens,)

    def get(self, key: Hashable) -> TokenPrompt | None:
        """Returns the prompt of a key; None if it is not kept."""
        return self._prompts.get(key)

    def add(self, key: Hashable, prompt: TokenPrompt) -> None:
        """Keeps a prompt, unless all would hold too many tokens."""
        size = len(prompt.input_ids) + len(prompt.answer_ids)
        with self._lock:
            if key not in self._prompts and self._tokens + size <= self.most_tokens:
                self._tokens += size
                self._prompts[key] = prompt

    def fill(self, functions: Iterable[Callable[[], object]]) -> None:
        """Calls functions that add prompts, in threads, while the caller goes on."""
        self.settle()
        self._settle = called_aside(functions)

    def settle(self) -> None:
        """Ends what `fill` began: waits for the calls in progress, and drops the others."""
        if self._settle is not None:
            self._settle()
            self._settle = None

    def clear(self) -> None:
        """Removes all prompts."""
        self.settle()
        with self._lock:
            self._prompts.clear()
            self._tokens = 0
