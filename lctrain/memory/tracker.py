"""Tracker: counts the bytes of live tensors while a model runs on the meta device."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lctrain.memory.experts import grouped_product
from lctrain.memory.quantized import is_quantized, make_dense
from lctrain_kernels.autocast import autocast_dtype, autocast_on_meta

_BACKWARD_WORKSPACE = {
    "varlen_backward": 1,
    "varlen_backward_into": 1,
    "dual_chunk_backward": 1,
    "differential_backward": 2,
}
"""Attention's backward operators -> tensors of the size of q that they accumulate in float32."""
_BY_HEAD = frozenset(("varlen_backward", "varlen_backward_into", "dual_chunk_backward"))
"""Backward operators that can run one key/value head at a time."""
_GROUPED = torch.ops.aten._grouped_mm.default


class Tracker(TorchDispatchMode):
    """Dispatch mode that counts the bytes of tensor storages that are allocated and freed.

    Attributes:
        live: Bytes of the storages that exist now.
        peak: Largest value of `live` since `restart`, including the workspace of attention kernels
            in the backward.
        peak_by_head: What `peak` would be if attention's backward ran one key/value head at a time.
        peak_beside: What `peak` would be if attention's backward overwrote none of its inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.peak_by_head = 0
        self.peak_beside = 0
        self._known: set[int] = set()

    def restart(self) -> None:
        """Sets all peaks to the bytes that exist now."""
        self.peak = self.peak_by_head = self.peak_beside = self.live

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Excludes the storages of tensors, such as weights, from the count."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is _GROUPED and args[0].is_meta:  # takes bfloat16 only on the meta device
            found: Any = grouped_product(*args[:3])
        else:
            found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        schema = getattr(func, "_schema", None)
        name = "" if schema is None else schema.name.removeprefix("lctrain::")
        space = by_head = overwritten = 0
        if name in _BACKWARD_WORKSPACE:
            packed = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.dim() == 3]
            into, results = [], tree_leaves(found)
            if name.endswith("_into"):  # the gradients are arguments: operands, or new tensors
                into = packed[-3:]
                operands = {x.untyped_storage()._cdata for x in packed[:-3]}
                overwritten = sum(x.nbytes for x in into if x.untyped_storage()._cdata in operands)
            space = by_head = _BACKWARD_WORKSPACE[name] * 4 * max(x.numel() for x in packed)
            heads = min(x.shape[1] for x in packed)  # of keys and values
            if name in _BY_HEAD and heads > 1:  # a head's gradients, beside those of all heads
                by_head = (space + sum(x.nbytes for x in [*into, *results])) // heads
        self.peak = max(self.peak, self.live + space)
        self.peak_by_head = max(self.peak_by_head, self.live + by_head)
        self.peak_beside = max(self.peak_beside, self.live + space + overwritten)
        return found

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or size == 0:
            return
        self._known.add(key)
        self.live += size
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Bfloat16Products(TorchFunctionMode):
    """Casts float32 inputs of matrix products to bfloat16, as bf16-mixed precision does on a GPU.

    torch has no autocast for the meta device. `autocast_on_meta` says where it would be on.

    Args:
        weights: Cache of bfloat16 weights by the id of the float32 weight, like autocast's. This
            mode adds to the cache, and the caller clears it.
    """

    def __init__(self, weights: dict[int, Tensor]) -> None:
        super().__init__()
        self._weights = weights

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        products = (nn.functional.linear, torch.matmul, torch.bmm, torch.mm)
        is_on = autocast_dtype("meta") is not None
        if is_on and func in products and isinstance(args[0], Tensor):
            args = [self._cast(value) for value in args]
        return func(*args, **(kwargs or {}))

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(torch.bfloat16)
        if id(value) not in self._weights:
            self._weights[id(value)] = value.to(torch.bfloat16)
        return self._weights[id(value)]


@contextmanager
def torch_autocast_takes_meta() -> Iterator[None]:
    """Context manager in which `torch.autocast("meta")` does what `autocast_on_meta` does.

    Libraries enter autocast on the device of a weight, as peft does for adapters of experts.
    """
    autocast: Any = torch.autocast

    def make(device_type: str, dtype: Any = None, enabled: bool = True, **options: Any) -> Any:
        if device_type != "meta":
            return autocast(device_type, dtype, enabled, **options)
        return autocast_on_meta((dtype or torch.bfloat16) if enabled else None)

    with patch.object(torch, "autocast", make), patch.object(torch.amp, "autocast", make):
        yield


def skeleton(model: nn.Module) -> Any:
    """Returns a copy of a model on the meta device, with its patches and adapters.

    Quantized weights are dense in the copy.

    Args:
        model: A model on any device, which is not changed.
    """
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if is_quantized(tensor):
            memo[id(tensor)] = tensor  # until its layer is replaced by a dense one
            continue
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
        memo[id(tensor)] = empty
    found = copy.deepcopy(model, memo)
    make_dense(found)
    return found
