"""Counts the bytes of quantized weights for the memory plan, and replaces them by dense ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 64  # weights that share a scale in nf4
_NESTED = 256  # scales of nf4 that share a second scale (double quantization)
_TABLES = 4 * (16 + 256)  # bytes of nf4's two float32 tables: of weights, and of scales
_ROW = 5  # bytes of a row's scale and zero point in torchao's int8


def stored_bytes(tensor: Tensor) -> int:
    """Returns the bytes of a weight, including the scales of a quantized weight.

    Args:
        tensor: A dense tensor, a weight of bitsandbytes, or a tensor subclass such as torchao's.
    """
    state = getattr(tensor, "quant_state", None)
    if state is not None:  # quantized by bitsandbytes
        parts = [x for x in state.as_dict(packed=False).values() if isinstance(x, Tensor)]
        return tensor.numel() * tensor.element_size() + sum(map(stored_bytes, parts))
    if is_quantized(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def is_quantized(tensor: Any) -> bool:
    """Returns whether a weight is quantized, by bitsandbytes or by a tensor subclass."""
    if getattr(tensor, "quant_state", None) is not None:
        return True
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__")


def dense_like(tensor: Any) -> Tensor:
    """Returns a meta tensor with the shape and dtype of a weight, after dequantization if needed.

    Args:
        tensor: A weight, quantized or not.
    """
    state = getattr(tensor, "quant_state", None)
    shape, dtype = (tensor.shape, tensor.dtype) if state is None else (state.shape, state.dtype)
    return torch.empty(shape, dtype=dtype, device="meta")


def planned_bytes(weight: Tensor, quantize: str | None) -> int:
    """Returns the bytes that a weight [O, I] will take after quantization.

    Args:
        weight: A dense weight of a linear layer.
        quantize: Format: nf4 (bitsandbytes, double quantization), int8 (torchao, a scale for each
            row), or None for dense weights.
    """
    count = weight.numel()
    if quantize == "nf4":
        scales = -(-count // _BLOCK)
        return -(-count // 2) + scales + 4 * -(-scales // _NESTED) + _TABLES
    if quantize == "int8":
        return count + _ROW * weight.shape[0]
    return stored_bytes(weight)


def weight_bytes(model: Any, quantize: str | None = None) -> tuple[int, int]:
    """Returns the bytes of all weights and buffers, and those of the largest dequantized weight.

    A matrix product with a quantized weight needs a dense copy of that weight while it runs.

    Args:
        model: A model, or a PeftModel around one.
        quantize: Format in which the frozen linear layers of a dense model will be stored, except
            the output projection; None for the model as it is.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    later = set()
    if quantize is not None:
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        later = {id(m.weight) for m in linear if not m.weight.requires_grad}
    total = largest = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) in later:
            total += planned_bytes(tensor, quantize)
        else:
            total += stored_bytes(tensor)
        if id(tensor) in later or is_quantized(tensor):
            dense = dense_like(tensor)
            largest = max(largest, dense.numel() * dense.element_size())
    return total, largest


def make_dense(model: nn.Module) -> None:
    """Replaces quantized linear layers of a model by dense ones on the meta device, in place.

    Args:
        model: A copy of a model. Its quantized weights may be on any device.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            weight = child._parameters.get("weight")  # its own, not that inside an adapter
            if not is_quantized(weight):
                continue
            dense = dense_like(weight)
            linear = nn.Linear(
                dense.shape[1], dense.shape[0], child.bias is not None, "meta", dense.dtype
            )
            setattr(module, name, linear.requires_grad_(False))
