"""Makes transformers' models compute in float64 throughout, so that they can be references.

with float64_throughout():
    reference = copy.deepcopy(model).double()(tokens)
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor


@contextmanager
def float64_throughout(float32_frequencies: bool = False) -> Iterator[None]:
    """Keeps float64 tensors from being rounded to float32, as transformers' norms and softmax do.

    Sines and cosines of float32 angles are computed in float64 and rounded: a vectorised float32
    sine differs in its last bit between CPUs, and between positions in one tensor. torch.compile
    cannot trace these patches.

    Only calls from transformers' code are changed, so that tests find a wrong cast anywhere else.

    Args:
        float32_frequencies: Still rounds 1-D tensors, such as RoPE frequencies, to float32, because
            dual chunk attention takes frequencies and scales in float32.
    """
    softmax, sum_ = torch.nn.functional.softmax, torch.sum
    to, float_, matmul = Tensor.to, Tensor.float, Tensor.__matmul__

    def widened(tensor: Tensor, dtype: Any) -> Any:
        """Returns the dtype that a conversion of `tensor` to `dtype` really gets."""
        stays = tensor.dtype == torch.float64
        if float32_frequencies and tensor.dim() == 1 and not tensor.requires_grad:
            return dtype
        if torch.get_default_dtype() == torch.float64:
            stays = stays or not tensor.is_floating_point()
        return torch.float64 if dtype == torch.float32 and stays else dtype

    def wide_to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _is_transformers(sys._getframe(1)):
            return to(tensor, *args, **kwargs)
        args = tuple(widened(tensor, x) if isinstance(x, torch.dtype) else x for x in args)
        if "dtype" in kwargs:
            kwargs["dtype"] = widened(tensor, kwargs["dtype"])
        return to(tensor, *args, **kwargs)

    def wide_float(tensor: Tensor, **kwargs: Any) -> Tensor:
        if not _is_transformers(sys._getframe(1)):
            return float_(tensor, **kwargs)
        return to(tensor, widened(tensor, torch.float32), **kwargs)

    def wide_softmax(states: Tensor, dim: Any = None, dtype: Any = None, **kwargs: Any) -> Tensor:
        if _is_transformers(sys._getframe(1)):
            dtype = widened(states, dtype)
        return softmax(states, dim=dim, dtype=dtype, **kwargs)

    def wide_sum(terms: Tensor, *args: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
        if _is_transformers(sys._getframe(1)):
            dtype = widened(terms, dtype)
        return sum_(terms, *args, dtype=dtype, **kwargs)

    def wide_matmul(left: Tensor, right: Tensor) -> Tensor:
        """Multiplies in float64 where float64 frequencies meet float32 positions."""
        mixed = {left.dtype, right.dtype} == {torch.float32, torch.float64}
        if mixed and _is_transformers(sys._getframe(1)):
            left, right = to(left, torch.float64), to(right, torch.float64)
        return matmul(left, right)

    def rounded(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda angles: to(function(to(angles, torch.float64)), angles.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", wide_softmax)
        patch.setattr(torch, "sum", wide_sum)
        patch.setattr(Tensor, "to", wide_to)
        patch.setattr(Tensor, "float", wide_float)
        patch.setattr(Tensor, "__matmul__", wide_matmul)
        for name, function in (("cos", Tensor.cos), ("sin", Tensor.sin)):
            patch.setattr(Tensor, name, rounded(function))
        yield


def _is_transformers(caller: FrameType) -> bool:
    return str(caller.f_globals.get("__name__")).startswith("transformers.")


@contextmanager
def built_in_float64(float32_frequencies: bool = False) -> Iterator[None]:
    """Inside the block, models are built and loaded in float64 and compute in float64 throughout.

    Args:
        float32_frequencies: As in `float64_throughout`.
    """
    torch.set_default_dtype(torch.float64)
    try:
        with float64_throughout(float32_frequencies):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
