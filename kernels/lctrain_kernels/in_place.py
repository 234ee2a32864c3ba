"""Says which inputs of an attention its backward may overwrite with their gradients.

Under activation checkpointing the backward rebuilds the inputs of a layer's attention. Once the
attention's own backward has them, often nothing else does. Their gradients then take their memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.autograd.function import BackwardCFunction

_IS_REBUILT: ContextVar[bool] = ContextVar("_IS_REBUILT", default=False)


@contextmanager
def inputs_rebuilt() -> Iterator[None]:
    """Context manager for a forward whose saved tensors the backward rebuilds, and reads once.

    The backward of varlen attention then overwrites inputs that nothing else holds.
    """
    token = _IS_REBUILT.set(True)
    try:
        yield
    finally:
        _IS_REBUILT.reset(token)


def are_rebuilt() -> bool:
    """Returns whether `inputs_rebuilt` is active."""
    return _IS_REBUILT.get()


def is_plain_backward(ctx: Any) -> bool:
    """Returns whether a backward runs in torch's engine, for gradients without a graph.

    False under create_graph, compiled autograd, torch.compile, torch.func and anomaly detection.

    Args:
        ctx: Context of the autograd function.
    """
    return (
        isinstance(ctx, BackwardCFunction)
        and not torch.is_grad_enabled()
        and not torch.is_anomaly_enabled()
        and not torch._C._are_functorch_transforms_active()
        and get_eval_frame_callback() is None
    )


def is_unheld(tensors: list[Any], place: int) -> bool:
    """Returns whether a list is all that holds a tensor and its memory.

    A view or another tensor with the same storage holds the memory, too. So does an autograd node
    that saved the tensor, a hook that keeps it, and an object that keeps its storage. Memory that
    torch did not allocate, such as a NumPy array's, may have holders that no count shows. Work that
    another CUDA stream still has to do is not seen.

    Args:
        tensors: List with the tensor. No other variable refers to the tensor.
        place: Index of the tensor in the list.
    """
    x = tensors[place]
    if type(x) is not Tensor or not x.is_contiguous() or x.numel() == 0 or x.is_neg():
        return False
    storage = x.untyped_storage()
    fills = x.storage_offset() == 0 and storage.nbytes() == x.nbytes and storage.resizable()
    del x, storage
    # Counted twice, at import and now: a debugger or a dispatch mode may hold one of the tensors.
    alone = tuple(map(min, _ALONE, _count_alone()))
    return fills and alone[0] == 1 and _holders(tensors, place) == alone


def _holders(tensors: Sequence[Tensor], place: int) -> tuple[int, int, int, int]:
    """Returns the numbers of references to a tensor and to its storage, in C++ and in Python."""
    x: Any = tensors[place]
    storage = x.untyped_storage()
    of_storage = torch._C._storage_Use_Count(storage._cdata)
    return x._use_count(), sys.getrefcount(x), of_storage, sys.getrefcount(storage)


def _count_alone() -> tuple[int, int, int, int]:
    """Returns the counts of a tensor that one list holds."""
    return _holders([torch.empty(1, device="cpu")], 0)


_ALONE = _count_alone()
