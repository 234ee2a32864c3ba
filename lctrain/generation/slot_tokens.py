"""SlotTokens: the tokens of running requests that the next step reads, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lctrain.generation.request import Request
from lctrain.transfer import upload


class SlotTokens:
    """Last token of each running request, and its history if the choice of tokens reads it.

    So a step needs no token from the host, which may read them while the next step runs.

    Args:
        slots: Most requests that run together, S.
        longest: Most tokens of a request L; None keeps no history.
        device: Device of the tokens.

    Attributes:
        spare: Number of a row that no request has, for the padding of a batch.
        last: [S + 1] int64, last token of each slot, which is not in the cache yet.
        history: [S + 1, L] int64, tokens of each slot, in any order and number; or None.
    """

    def __init__(self, slots: int, longest: int | None, device: torch.device) -> None:
        self.spare = slots
        self.last = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.history: Tensor | None = None
        if longest is not None:
            self.history = torch.zeros(slots + 1, longest, dtype=torch.int64, device=device)

    def begin(self, requests: Sequence[Request]) -> Tensor | None:
        """Writes the history of requests that have been admitted, and returns it, [n, L].

        Args:
            requests: Requests with all tokens that they have so far.
        """
        if self.history is None:
            return None
        for request in requests:
            ids = upload(torch.tensor(request.tokens), self.history.device)
            self.history[request.slot] = ids[0]
            self.history[request.slot, : len(ids)] = ids
        return self.history[self._slots(requests)]

    def write_last(self, requests: Sequence[Request], tokens: Tensor) -> None:
        """Stores the last token of each request.

        Args:
            requests: Requests.
            tokens: [n] int64.
        """
        self.last.index_copy_(0, self._slots(requests), tokens)

    def _slots(self, requests: Sequence[Request]) -> Tensor:
        return upload(torch.tensor([request.slot for request in requests]), self.last.device)
