"""StopStrings: finds completions that end with a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_NO_TOKEN = 2**40
"""An id beyond every vocabulary: transformers' criterion lets it match nothing."""


class StopStrings:
    """Finds completions that end with a stop string, of different lengths in one call.

    Args:
        tokenizer: Tokenizer of transformers.
        stop: Stop strings.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        from transformers import StopStringCriteria

        self._criterion = StopStringCriteria(tokenizer, list(stop))
        self._last = max(len(text.encode()) for text in stop)  # a token has a byte at least

    def __call__(self, completions: Sequence[Sequence[int]]) -> list[bool]:
        """Returns, for each completion, whether it ends with a stop string.

        Args:
            completions: Token ids of each completion.
        """
        ends = [completion[-self._last :] for completion in completions]
        rows = [[_NO_TOKEN] * (self._last - len(end)) + list(end) for end in ends]
        found: list[bool] = self._criterion(torch.tensor(rows), None).tolist()
        return found
