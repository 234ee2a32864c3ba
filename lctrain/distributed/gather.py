"""gathered: gathers the parameters of modules that FSDP2 shards, for a run outside of their turn.

run_in_forward: runs a loss that uses a sharded model's weights as a forward pass of the model.
sharded_modules: the modules to gather for a run of a whole model. gathered_bytes: what they take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lctrain.distributed.sharding import root_of

Result = TypeVar("Result")


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Context manager in which a sharded module has its whole parameters.

    In the backward, FSDP2 gathers the parameters of the layer whose turn it is. A segment also runs
    earlier layers then. All ranks run the same layers, so all of them join the collective. Forward
    passes inside communicate nothing.

    Args:
        module: A layer. Nothing happens if FSDP2 does not shard it.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        with _as_if_recomputed(module._get_fsdp_state()):
            yield
    finally:
        module.reshard()


@contextmanager
def _as_if_recomputed(state: Any) -> Iterator[None]:
    """Sets FSDP2's own mark of a recomputed forward: its hooks leave the order of layers alone.

    Args:
        state: The FSDPState of a module.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    before, state._training_state = state._training_state, TrainingState.PRE_BACKWARD
    try:
        yield
    finally:
        state._training_state = before


def run_in_forward(model: nn.Module, function: Callable[[], Result]) -> Result:
    """Returns `function()`, run as a forward pass of a model that FSDP2 shards.

    A loss calls parts of a model, and reads the weight of its output embedding. FSDP2 gathers
    weights outside of the layers only in the forward of their root. Nothing changes for a model
    that is whole, and inside the forward of its root.

    Args:
        model: A causal LM. If it is sharded, all ranks call this function together.
        function: Returns a tensor, or a tuple of them. It may call the model.

    Raises:
        ValueError: if a weight outside of the layers is a shard that the model does not gather.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return function()
    find_head = getattr(model, "get_output_embeddings", None)
    head: Any = None if find_head is None else find_head()
    if isinstance(head, FSDPModule) and isinstance(getattr(head, "weight", None), DTensor):
        raise _out_of_reach("the weight of the output embedding", "a group of its own")
    inside = [module for module in model.modules() if isinstance(module, FSDPModule)]
    of_layers = {id(p) for module in inside if module is not model for p in module.parameters()}
    shards = [
        name
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor) and id(parameter) not in of_layers
    ]
    if not shards:
        return function()
    root = root_of(model)
    held: Any = model if root is None else root
    if not isinstance(held, FSDPModule):
        raise _out_of_reach(shards[0], "a module around the model")
    if root is not None:
        result: Result = root(function)
    else:
        state: Any = held._get_fsdp_state()
        state._pre_forward(held, (), {})
        with _as_if_recomputed(state):  # the function may call the model
            result = function()
        result = state._post_forward(held, (), result)
    if not torch.is_grad_enabled():
        held.reshard()  # a backward does it otherwise
    return result


def _out_of_reach(name: str, group: str) -> ValueError:
    return ValueError(
        f"a loss must run while the weights outside of the layers are gathered, got {name}, a "
        f"shard of {group}. Call the loss in the forward of the module that fully_shard was called "
        "on last, and leave the output embedding to that module; or train with "
        "trainer.strategy=fsdp2, and call it in through_root."
    )


def sharded_modules(model: nn.Module, outer: nn.Module | None = None) -> list[Any]:
    """Returns the FSDPModules that hold a model's parameters, those outside before those inside.

    A ShardRoot around the model is the first. FSDP2 is set up for the collectives of all of them,
    as in a first forward pass.

    Args:
        model: A model, sharded or not.
        outer: A module around the model that may be an FSDPModule, too.

    Returns:
        The modules; an empty list if FSDP2 does not shard the model.

    Raises:
        ValueError: if another module around the model has parameters of it.
    """
    root: nn.Module | None = root_of(model)
    if root is None and outer is not model and isinstance(outer, FSDPModule):
        root = outer
    found: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not found:
        return [] if root is None else _set_up([root])
    found = found if root is None else [root, *found]
    held = {id(parameter) for module in found for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, DTensor) and id(parameter) not in held:
            raise ValueError(
                f"model must be the module that fully_shard was called on last, got a part of it: "
                f"{name} is sharded by a module around it. Pass the outer module, or the "
                "LongContextModule."
            )
    return _set_up(found)


def gathered_bytes(modules: Sequence[Any]) -> int:
    """Returns the bytes of a device that the gathered parameters of modules take at most.

    They have the dtype of FSDP2's policy. The largest module is counted twice: FSDP2 copies the
    gathered parameters into place.

    Args:
        modules: Result of sharded_modules. Parameters that are gathered already are left out.
    """
    sizes: dict[int, tuple[int, int]] = {}
    for number, module in enumerate(modules):  # a module inside comes later, and replaces
        dtype = module._get_fsdp_state()._mp_policy.param_dtype
        for parameter in module.parameters():
            if isinstance(parameter.data, DTensor):
                size = parameter.numel() * (dtype or parameter.dtype).itemsize
                sizes[id(parameter)] = (number, size)
    totals = [0] * len(modules)
    for number, size in sizes.values():
        totals[number] += size
    return sum(totals) + max(totals, default=0)


def free_bytes(device: torch.device) -> int | None:
    """Returns the free bytes of a GPU, with those that torch holds unused; None for a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _set_up(modules: list[Any]) -> list[Any]:
    """Makes the outermost modules the roots of FSDP2, unless a forward pass has done so."""
    inside: set[nn.Module] = set()
    for module in modules:
        if module not in inside:
            module._get_fsdp_state()._lazy_init()
            inside |= set(module.modules())
    return modules
