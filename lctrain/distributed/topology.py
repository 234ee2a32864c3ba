"""Topology: the ranks of a run, how they divide parameters and packs, and their collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


class OtherRankError(ValueError):
    """Raised on ranks that did not fail, with the message of the rank that did.

    Attributes:
        lctrain_told: Set on every error that all ranks know of; they leave together.
    """

    lctrain_told = True


@dataclass(frozen=True)
class _Failure:
    """What a rank that has failed exchanges instead of a value."""

    message: str


@dataclass(frozen=True)
class Topology:
    """The ranks of a run, and how they divide the parameters and the packs.

    Ranks are numbered by (replica, shard, context rank); the context rank varies fastest.

    - A replica is a set of ranks that together hold all parameters once; each rank holds a shard.
    - A context group is a set of ranks that compute one pack together.
    - Different context groups train on different packs.

    Code gets rank and number of ranks from this class only, by `Topology.of(trainer)`.

    Attributes:
        rank: Number of this rank, from 0.
        size: Number of ranks.
        replicas: Number of copies of the parameters; None for one copy per rank.
        context: Number of ranks in a context group.
        is_sharded: Whether parameters, gradients and optimizer states are DTensors, as with FSDP2
            (even with one rank).
        heads: Number of ranks of a heads group, as in ContextShard: ranks of a context group that
            exchange heads. They gather keys from the other ranks of the group.
        context_groups: Process groups of the ranks that share this rank's pack, a ContextGroups;
            None if `context` is 1.

    Raises:
        ValueError: if the sizes do not divide the number of ranks.
    """

    rank: int = 0
    size: int = 1
    replicas: int | None = None
    context: int = 1
    is_sharded: bool = False
    heads: int = 1
    context_groups: Any = None

    def __post_init__(self) -> None:
        copies = 1 if self.replicas is None else self.replicas
        if self.size % (copies * self.context) != 0:
            raise ValueError(
                f"replicas * context must divide the number of ranks, got {copies} * "
                f"{self.context} and {self.size} ranks. Change trainer.replicas, "
                "trainer.context_parallel, trainer.devices or trainer.num_nodes."
            )

    @classmethod
    def of(cls, trainer: Any) -> Topology:
        """Returns the topology of a trainer's ranks; that of a single rank for None.

        Args:
            trainer: Lightning's Trainer. A strategy of lctrain knows its topology; every other one
                has a copy of the parameters on each rank.
        """
        if trainer is None:
            return cls()
        known = getattr(getattr(trainer, "strategy", None), "topology", None)
        return known if isinstance(known, cls) else cls(trainer.global_rank, trainer.world_size)

    @classmethod
    def of_process(cls) -> Topology:
        """Returns the topology of torch's default process group.

        Without a process group, it is that of a single rank.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and messages."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Index of this rank's pack among the packs that all ranks compute at the same time."""
        return self.rank // self.context

    @property
    def data_size(self) -> int:
        """Number of packs that all ranks compute at the same time."""
        return self.size // self.context

    @property
    def context_rank(self) -> int:
        """Index of this rank in its context group."""
        return self.rank % self.context

    @property
    def shards(self) -> int:
        """Number of ranks among which one copy of the parameters is divided."""
        return 1 if self.replicas is None else self.size // self.replicas

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds up a tensor over all ranks, in place. All ranks must call it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def minimum(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor by the minimum over all ranks, in place. All ranks must call it."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor

    def maximum(self, tensor: Tensor, group: Any = None) -> Tensor:
        """Replaces a tensor by the maximum over all ranks, in place. All ranks must call it.

        Args:
            tensor: The tensor.
            group: Process group of all ranks; None for the default one.
        """
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
        return tensor

    def least(self, value: int) -> int:
        """Returns the smallest of the values of all ranks. All ranks must call it."""
        return min(self.gather(value))

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks in rank order, on every rank. Values are pickled.

        Raises:
            OtherRankError: if a rank has failed in `failing_together` instead of calling `gather`.
        """
        values = self._exchange(value)
        for other in values:
            if isinstance(other, _Failure) and not isinstance(value, _Failure):
                raise OtherRankError(other.message)
        return values

    def _exchange(self, value: Any) -> list[Any]:
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Context manager from which all ranks raise if one does. All ranks must use it.

        The body may call `gather`, and no other collective. A rank that fails takes part in one
        more exchange: in that with which the others leave the body, or in their next `gather`.

        Raises:
            OtherRankError: on ranks that did not fail, with the message of the first one that did.
        """
        try:
            yield
        except Exception as error:
            if self.size > 1 and not hasattr(error, "lctrain_told"):
                error.lctrain_told = True  # type: ignore[attr-defined]
                self.gather(_Failure(str(error) or type(error).__name__))
            raise
        self.gather(None)

    def of_first(self, value: Any) -> Any:
        """Returns the value of rank 0, which is pickled, on every rank. All ranks must call it."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def cpu_group(self) -> Any:
        """Returns a process group that reduces on the CPU; None with one rank.

        All ranks must call it.
        """
        if self.size == 1:
            return None
        # A reduction with gloo does not wait for the device.
        gloo = dist.get_backend() == "gloo"
        return dist.group.WORLD if gloo else dist.new_group(backend="gloo")


ONE_RANK = Topology()
"""The topology of a process without others."""
