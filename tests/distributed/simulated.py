"""Simulates the ranks of a group in one process: one thread each, of which one runs at a time.

Collectives wait until all ranks of their group have called them. Every one is recorded.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lctrain.distributed import attention, collectives

LIMIT_S = 300  # ranks that wait for each other for ever fail after it


@dataclass
class Ranks:
    """The ranks of a simulated group; their process groups are tuples of ranks.

    Attributes:
        size: Number of ranks.
        received: Bytes that every rank received from others, by name of the collective.
        calls: Names of the collectives that every rank called, in order.
        dtypes: Dtypes of the tensors of every collective.
    """

    size: int
    received: list[dict[str, int]] = field(default_factory=list)
    calls: list[list[str]] = field(default_factory=list)
    dtypes: set[tuple[str, torch.dtype]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.received = [{} for _ in range(self.size)]
        self.calls = [[] for _ in range(self.size)]
        self._turn = threading.Condition()
        self._local = threading.local()
        self._given: dict[Any, dict[int, Any]] = {}
        self._counts: list[dict[Any, int]] = [{} for _ in range(self.size)]
        self._failed = False

    def run(self, function: Callable[[int], Any], monkeypatch: Any) -> list[Any]:
        """Returns the results of `function(rank)` of all ranks, in their order."""
        names = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
        simulated = {name: getattr(self, name) for name in (*names, "broadcast", "get_world_size")}
        for module in (attention, collectives):
            monkeypatch.setattr(module, "dist", SimpleNamespace(**simulated))
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def thread(rank: int) -> None:
            self._local.rank = rank
            with self._turn:
                try:
                    results[rank] = function(rank)
                except BaseException as error:
                    errors.append(error)
                    self._failed = True
                    self._turn.notify_all()

        threads = [threading.Thread(target=thread, args=(rank,)) for rank in range(self.size)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        if errors:
            raise errors[0]
        return results

    def get_world_size(self, group: Any) -> int:
        return len(self._members(group))

    def all_to_all_single(
        self, out: Tensor, rows: Tensor, received: list[int], sent: list[int], group: Any
    ) -> None:
        given, place = self._exchange("all_to_all", group, rows.split(sent))
        parts = [parts[place] for parts in given]
        assert [len(part) for part in parts] == received
        torch.cat(parts, out=out)
        self._count("all_to_all", sum(part.nbytes for i, part in enumerate(parts) if i != place))

    def all_gather_into_tensor(self, out: Tensor, rows: Tensor, group: Any) -> None:
        given, _ = self._exchange("all_gather", group, rows)
        torch.cat(given, out=out)
        self._count("all_gather", out.nbytes - rows.nbytes)

    def reduce_scatter_tensor(self, out: Tensor, rows: Tensor, group: Any) -> None:
        given, place = self._exchange("reduce_scatter", group, rows)
        out.copy_(sum(rows.chunk(len(given))[place] for rows in given))
        self._count("reduce_scatter", rows.nbytes - out.nbytes)

    def broadcast(self, tensor: Tensor, group: Any, group_src: int) -> None:
        given, _ = self._exchange("broadcast", group, tensor.clone())
        tensor.copy_(given[group_src])

    def _members(self, group: Any) -> tuple[int, ...]:
        return tuple(range(self.size)) if group is None else group

    def _count(self, name: str, count: int) -> None:
        found = self.received[self._local.rank]
        found[name] = found.get(name, 0) + count

    def _exchange(self, name: str, group: Any, value: Any) -> tuple[list[Any], int]:
        """Returns the values of all ranks of a group, and this rank's place in it."""
        rank, members = self._local.rank, self._members(group)
        assert rank in members
        number = self._counts[rank][members] = self._counts[rank].get(members, 0) + 1
        first = value if isinstance(value, Tensor) else value[0]
        self.calls[rank].append(name)
        self.dtypes.add((name, first.dtype))
        given = self._given.setdefault((name, members, number), {})
        given[rank] = value
        self._turn.notify_all()
        if not self._turn.wait_for(lambda: len(given) == len(members) or self._failed, LIMIT_S):
            raise TimeoutError(f"rank {rank} waits in {name} for {set(members) - set(given)}")
        assert len(given) == len(members), "another rank failed"
        return [given[member] for member in members], members.index(rank)


def groups_of(rank: int, size: int, heads: int) -> tuple[tuple[int, ...], ...]:
    """Returns the groups of a rank: whole, heads and keys, as in ContextGroups."""
    first, everyone = rank - rank % heads, tuple(range(size))
    return everyone, everyone[first : first + heads], everyone[rank % heads :: heads]
