"""WholeWeights: the weights of a sharded model, gathered once for a call of generate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lctrain.distributed import Topology
from lctrain.distributed.gather import free_bytes, gathered, gathered_bytes, sharded_modules


class WholeWeights:
    """The weights of a model that FSDP2 shards, as a context of a call of generate.

    Ranks complete different prompts in different numbers of steps. If layers gathered their weights
    in every step, ranks that have ended would have to join the gathers of the others, and every
    token would wait for them. So the weights are gathered once, and a step communicates nothing. A
    rank needs the memory of the whole model meanwhile.

    Nothing happens for a model that FSDP2 does not shard.

    Args:
        model: A causal LM. All ranks make this object, and use both of its contexts.
        outer: The module around it that the caller has; the same if there is none.
    """

    def __init__(self, model: nn.Module, outer: nn.Module) -> None:
        self._modules = sharded_modules(model, outer)
        self._ranks = Topology.of_process() if self._modules else Topology()

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Context in which arguments are read: all ranks raise if one does.

        Raises:
            ValueError: if the weights do not fit the memory of a rank, and on ranks whose own
                arguments are right, with the message of the first one that raised.
        """
        if not self._modules:
            yield
            return
        with self._ranks.failing_together():
            yield
            self._require_room()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Context in which the model has its whole weights: all ranks raise if one does.

        Ranks wait at its end for the one that generates longest.
        """
        if not self._modules:
            yield
            return
        with ExitStack() as stack:
            for module in self._modules:
                stack.enter_context(gathered(module))
            stack.enter_context(self._ranks.failing_together())
            yield
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _device(self) -> torch.device:
        """Device of the gathered weights."""
        device: torch.device = self._modules[0]._get_fsdp_state()._device
        return device

    def _require_room(self) -> None:
        free = free_bytes(self._device)
        needed = gathered_bytes(self._modules)
        if free is not None and needed > free:
            raise ValueError(
                f"the whole weights of a sharded model must fit each GPU while it generates, got "
                f"{needed / 2**30:.3g} GiB for them and {free / 2**30:.3g} GiB of free memory on "
                f"{self._device}. Free memory before the call, or use GPUs with more memory; more "
                "of them do not help."
            )
