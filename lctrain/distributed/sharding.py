"""shard_model: divides a model's parameters over ranks with FSDP2, one group per decoder layer.

Parameters that are marked as stored in safetensors files are on the meta device on all ranks, and
each rank reads its own shards from the files. Only rank 0 needs the other parameters, and the
buffers. The other ranks build the model with parameters on the meta device, and receive their
shards from rank 0, one parameter at a time. Buffers are copied from rank 0 and are not sharded.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from lctrain.distributed.stored import StoredTensor, read_stored, stored_of
from lctrain.distributed.topology import Topology

_ROOTS: weakref.WeakValueDictionary[int, ShardRoot] = weakref.WeakValueDictionary()
"""Root of each model that is sharded, by the model's id; a root keeps its model alive."""
_IS_TO_BE_SHARDED = ContextVar("_IS_TO_BE_SHARDED", default=False)


class ShardRoot(nn.Module):
    """Root module of a sharded model: runs a function while the root's parameters are gathered.

    The root's parameters are those outside of the decoder layers, such as embeddings. Each decoder
    layer gathers its own parameters when it is called. Every use of a sharded model, such as a
    forward pass, is a function that `root(function)` runs. In it, all ranks must call the same
    layers in the same order.

    Args:
        model: The model that is sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        _ROOTS[id(model)] = self

    def forward(self, function: Callable[[], Any]) -> Any:
        """Returns `function()`."""
        return function()


def root_of(model: nn.Module) -> ShardRoot | None:
    """Returns the root with which `shard_model` has divided a model; None if it has not."""
    return _ROOTS.get(id(model))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Context manager in which modules get parameters on device meta, and buffers as usual."""

    def replace(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def built_to_be_sharded(is_first: bool) -> Iterator[None]:
    """Context manager in which all ranks build a model that `shard_model` divides.

    The model may leave stored weights unread: see `lctrain.distributed.stored`.

    Args:
        is_first: Whether this is rank 0, which has the parameters that are not stored. On other
            ranks, modules get all parameters on device meta.
    """
    token = _IS_TO_BE_SHARDED.set(True)
    try:
        with nullcontext() if is_first else parameters_on_meta():
            yield
    finally:
        _IS_TO_BE_SHARDED.reset(token)


def is_to_be_sharded() -> bool:
    """Whether all ranks are building a model inside `built_to_be_sharded`."""
    return _IS_TO_BE_SHARDED.get()


def has_parameters_on_meta() -> bool:
    """Whether modules that are built now get parameters on device meta."""
    return nn.Linear(1, 1, bias=False).weight.is_meta


def take_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Moves a model's parameters to the meta device, and returns the original ones by name.

    A parameter that several modules share stays shared, and has one name in the result.

    Args:
        model: A model with parameters on any device.
    """
    taken = {name: parameter.detach() for name, parameter in model.named_parameters()}
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in replaced:
                empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                replaced[id(parameter)] = empty
            module._parameters[name] = replaced[id(parameter)]
    return taken


def decoder_layers(model: Any) -> list[nn.Module]:
    """Returns the modules that FSDP2 shards as one group each: the decoder layers.

    They are the modules whose class names are in the model's `_no_split_modules`. Without such a
    list, they are the entries of the model's longest ModuleList. A module with a parameter that a
    module outside of it has too, such as embeddings tied to the output layer, is left to the root:
    FSDP2 requires that one group has all modules with that parameter.

    Args:
        model: A transformers model, which may have PEFT adapters.
    """
    uses = Counter(_parameter_ids(model))
    names: set[str] = set()
    for module in model.modules():
        names |= set(getattr(module, "_no_split_modules", None) or ())
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside or not names & {kind.__name__ for kind in type(module).__mro__}:
            continue
        if _shares_parameters(module, uses):
            continue
        found.append(module)
        inside |= set(module.modules())
    if found:
        return found
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    longest: list[nn.Module] = max(map(list, lists), key=len, default=[])
    return [module for module in longest if not _shares_parameters(module, uses)]


def _parameter_ids(model: nn.Module) -> Iterator[int]:
    """Returns the id of every parameter of a model, once for each module that has it."""
    for module in model.modules():
        yield from (id(value) for value in module._parameters.values() if value is not None)


def _shares_parameters(module: nn.Module, uses: Counter[int]) -> bool:
    """Returns whether modules outside of `module` have a parameter of it.

    Args:
        module: A module of a model.
        uses: How many modules of the model have each parameter, by the parameter's id.
    """
    inside = Counter(_parameter_ids(module))
    return any(uses[parameter] > count for parameter, count in inside.items())


def shard_model(
    model: nn.Module, mesh: DeviceMesh, device: torch.device, policy: MixedPrecisionPolicy
) -> ShardRoot:
    """Divides a model's parameters over the ranks of a mesh.

    Args:
        model: The model, already patched. Rank 0 has its buffers, and its parameters that are not
            marked as stored; those of other ranks are not read.
        mesh: Mesh of the ranks: one dimension, or two for (replicas, shards).
        device: Device of this rank.
        policy: Dtypes of gathered parameters and of the reduction of gradients.

    Returns:
        The ShardRoot that runs every use of the model. The parameters of `model` become DTensors.

    Raises:
        ValueError: if a parameter has no value on rank 0 and in no file.
    """
    is_first = Topology.of_process().is_first
    places = {name: stored_of(parameter) for name, parameter in model.named_parameters()}
    lost = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_meta and places[name] is None
    ]
    if is_first and lost:
        raise ValueError(
            f"parameters must have values on rank 0, got {lost[0]} on device meta. Load a "
            "pretrained model with is_whole=True to change its weights before it is sharded."
        )
    whole = take_parameters(model)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    root = ShardRoot(model)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    _materialize(model, device)
    unread: dict[StoredTensor, DTensor] = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.data, DTensor)
        value = whole.pop(name)
        place = places[name]
        if place is not None:
            unread[place] = parameter.data
            continue
        full = value.to(device) if is_first else torch.empty_like(value, device=device)
        shards = distribute_tensor(full, mesh, parameter.data.placements)
        parameter.data.to_local().copy_(shards.to_local())
    read_stored(unread)
    return root


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Allocates the parameters that are on the meta device, and copies rank 0's buffers."""
    kept = [
        (module, name, buffer.to(device))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    model.to_empty(device=device)
    for module, name, buffer in kept:
        module._buffers[name] = value = buffer.contiguous()
        torch.distributed.broadcast(value, src=0)


def through_root(trainer: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Runs `function(*args)`, inside the ShardRoot if the trainer's model is sharded.

    Args:
        trainer: Lightning's Trainer, or None.
        function: Any function that calls the model or a part of it. If the model is sharded, all
            ranks must call the same layers in the same order.
        *args: Arguments of the function.
    """
    root = getattr(getattr(trainer, "strategy", None), "root", None)
    if root is None:
        return function(*args)
    result = root(partial(function, *args))
    if not torch.is_grad_enabled():
        root.reshard()  # a backward does it otherwise; optimizers and checkpoints need the shards
    return result


def local_part(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor, without a copy; another tensor is returned itself.

    Args:
        tensor: A tensor of any shape.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_value(tensor: Tensor) -> Tensor:
    """Returns the whole value of a DTensor, on every rank; another tensor is returned itself.

    Args:
        tensor: A tensor of any shape. If it is a DTensor, all ranks must call this function.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
