"""Keeps results of an oracle, since many tests compare other kernels on the same numbers."""

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import torch

Oracle = TypeVar("Oracle", bound=Callable[..., Any])
MOST_KEPT = 24


def keep_results(oracle: Oracle) -> Oracle:
    """Decorates an oracle (case, inputs, dtype, **options), which is run once for equal numbers.

    The last MOST_KEPT results of tensors on the CPU are kept, by the bytes of all inputs.

    Args:
        oracle: Function of a case, a dataclass of tensors or None, a dtype and keywords.
    """
    kept: OrderedDict[tuple, Any] = OrderedDict()

    @functools.wraps(oracle)
    def run(case: Any, inputs: Any, dtype: torch.dtype, **options: Any) -> Any:
        values = [getattr(inputs, field.name) for field in fields(inputs)]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if not all(tensor.is_cpu for tensor in tensors):
            return oracle(case, inputs, dtype, **options)
        digest = hashlib.blake2b()
        for tensor in tensors:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().flatten().contiguous().view(torch.uint8).numpy())
        others = [None if isinstance(value, torch.Tensor) else repr(value) for value in values]
        key = repr(case), dtype, repr(others), repr(options), digest.digest()
        if key not in kept:
            kept[key] = oracle(case, inputs, dtype, **options)
        kept.move_to_end(key)
        if len(kept) > MOST_KEPT:
            kept.popitem(last=False)
        return kept[key]

    return run
