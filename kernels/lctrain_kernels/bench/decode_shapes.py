"""Sizes of the cases of `lctrain-bench decode`, and the time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OURS = "lctrain"
COLD_BYTES = 512 * 2**20
"""Bytes of the caches of one graph, at least: ten times the L2 cache of an H200."""
MAX_DIFFERENCE = 2e-2
"""Largest relative difference from PyTorch's result: several roundings to bfloat16."""


@dataclass(frozen=True)
class DecodeShape:
    """Sizes of a case.

    Attributes:
        requests: Number of requests, with one query each.
        keys: Keys of each request.
        heads: Query heads.
        heads_kv: Key/value heads.
        head_dim: Head dim.
        prefix: First keys that all requests share; 0 if they share none.
    """

    requests: int
    keys: int
    heads: int = 32
    heads_kv: int = 8
    head_dim: int = 128
    prefix: int = 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of all requests in bfloat16, shared ones counted once."""
        return self.cache_bytes_of(self.prefix)

    def cache_bytes_of(self, prefix: int) -> int:
        """Returns the bytes of all keys and values if the first `prefix` ones count once."""
        tokens = self.requests * (self.keys - prefix) + prefix
        return 4 * tokens * self.heads_kv * self.head_dim


CASES = {
    f"{requests}x{keys}k": DecodeShape(requests, keys * 1024)
    for requests, keys in (
        *((1, 8), (1, 16), (1, 64), (1, 128), (16, 8), (16, 32), (16, 128)),
        *((64, 8), (64, 32)),
    )
} | {
    f"{requests}x16k+256": DecodeShape(requests, 16 * 1024 + 256, prefix=16 * 1024)
    for requests in (16, 64)
}
LAYOUTS = {"dense": 0, "page16": 16, "page64": 64, "page256": 256}
TINY = {
    "tiny": DecodeShape(2, 256, 4, 2, 16),
    "tiny+256": DecodeShape(3, 512, 4, 2, 16, prefix=256),
}


def time_calls(calls: Sequence[Any], timer: Any) -> float:
    """Returns the milliseconds of one call, from a timing of all of them in turn."""

    def run() -> None:
        for call in calls:
            call()

    return timer(run) / len(calls)
