"""gathered: gathers the parameters of a layer that FSDP2 shards, for a run outside of its turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Context manager in which a sharded module has its whole parameters.

    In the backward, FSDP2 gathers the parameters of the layer whose turn it is. A segment also runs
    earlier layers then. All ranks run the same layers, so all of them join the collective.

    Args:
        module: A layer. Nothing happens if FSDP2 does not shard it.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    module.unshard()
    state = module._get_fsdp_state()
    # FSDP2's own mark of a recomputed forward: its hooks then leave the order of layers alone.
    before, state._training_state = state._training_state, TrainingState.PRE_BACKWARD
    try:
        yield
    finally:
        state._training_state = before
        module.reshard()
