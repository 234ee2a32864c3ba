"""TiledMLPs: computes an MLP for a few tokens at a time, to save activation memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lctrain.memory.tiled_function import tiled
from lctrain.models.fused import CALLS_CLASS, has_own_forward
from lctrain_kernels.autocast import autocast_dtype

_PARTS = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}
_LOW = (torch.bfloat16, torch.float16)


class TiledMLPs:
    """Makes the MLPs of a model's layers compute a few tokens (a tile) at a time in training.

    Nothing of a tile is kept, so only one tile's activations exist at a time.
    The gradient of a weight is summed over the tiles in the weight's dtype, which must be float32.
    Outputs and gradients equal those without tiles within rounding.

    Args:
        layers: Layers of a transformers model. Their attribute `mlp` is the MLP.
        tokens: Number of tokens of a tile.

    Raises:
        ValueError: if no layer has a dense MLP, another library has replaced the forward of an MLP,
            or a trained weight of an MLP is float16 or bfloat16, in which the sum over tiles would
            lose bits.
    """

    def __init__(self, layers: list[Any], tokens: int) -> None:
        self._mlps = [layer.mlp for layer in layers if _is_dense(getattr(layer, "mlp", None))]
        if not self._mlps:
            raise ValueError(
                f"memory.mlp_tokens must be null for a model without dense MLPs, got {tokens}. "
                "Leave it out."
            )
        for mlp in self._mlps:
            _require_own_forward(mlp, tokens)
            _require_float32(mlp)
        self._forwards = [partial(_forward, mlp, tokens) for mlp in self._mlps]
        for forward in self._forwards:
            setattr(forward, CALLS_CLASS, True)  # patch_model may change the class below
        for mlp, forward in zip(self._mlps, self._forwards, strict=True):
            mlp.forward = forward

    def remove(self) -> None:
        """Restores the MLPs' own forward, unless a later TiledMLPs has replaced it."""
        for mlp, forward in zip(self._mlps, self._forwards, strict=True):
            if vars(mlp).get("forward") is forward:
                del mlp.forward


def _forward(mlp: Any, tokens: int, x: Tensor) -> Tensor:
    """Returns an MLP's output for x [..., S, E]; in training, computed tile by tile."""
    own = partial(_uncached, mlp)
    if x.shape[-2] <= tokens or not (mlp.training and torch.is_grad_enabled()):
        return type(mlp).forward(mlp, x)
    is_compiled = torch.compiler.is_compiling()  # it cannot trace the saved input of `tiled`
    if not is_compiled:
        _require_float32(mlp)
    if is_compiled or _has_inner_hooks(mlp):
        tiles = x.split(tokens, dim=-2)
        return torch.cat([checkpoint(own, tile, use_reentrant=False) for tile in tiles], dim=-2)
    return tiled(mlp, own, x, tokens, _same_autocast(x.device.type))


def _same_autocast(device: str) -> Callable[[], Any]:
    """Returns a function that returns a context with autocast as it is now."""
    if device == "meta":
        return nullcontext
    dtype = autocast_dtype(device)
    return partial(torch.autocast, device, dtype, enabled=dtype is not None)


def _uncached(mlp: Any, x: Tensor) -> Tensor:
    """Returns an MLP's output, with autocast's cache of bfloat16 weights turned off.

    With the cache, all tiles would use the same bfloat16 copy of a weight, and autograd would sum
    their gradients in bfloat16.
    """
    device = x.device.type
    dtype = autocast_dtype(device)
    if dtype is None or device == "meta":
        return type(mlp).forward(mlp, x)
    with torch.autocast(device, dtype, cache_enabled=False):
        return type(mlp).forward(mlp, x)


def _has_inner_hooks(mlp: nn.Module) -> bool:
    """Returns whether a module inside the MLP has forward hooks.

    They may pass tensors on, such as activations to an auxiliary loss. Inside `tiled` these would
    have no autograd history.
    """
    inner = (module for module in mlp.modules() if module is not mlp)
    return any(module._forward_hooks or module._forward_pre_hooks for module in inner)


def _require_own_forward(mlp: nn.Module, tokens: int) -> None:
    """Raises ValueError if a forward on the MLP replaces that of its class."""
    if has_own_forward(mlp):
        raise ValueError(
            f"memory.mlp_tokens must be null for an MLP whose forward was replaced on the module, "
            f"got {tokens}: tiles run the forward of {type(mlp).__name__}, its class. Leave "
            "mlp_tokens out, or undo the other change."
        )


def _require_float32(mlp: nn.Module) -> None:
    """Raises ValueError if a trained weight of the MLP is float16 or bfloat16.

    FSDP2 may gather weights in another dtype, so a forward checks them too.
    """
    trained = {p.dtype for p in mlp.parameters() if p.requires_grad} & set(_LOW)
    if trained:
        raise ValueError(
            f"memory.mlp_tokens needs trained weights in float32, got {trained.pop()}: the sum "
            "of their gradients over tiles would be rounded at every tile. Set "
            "model.dtype=float32 with trainer.precision=bf16-mixed, or train adapters."
        )


def _is_dense(module: nn.Module | None) -> bool:
    """Returns whether a module is an MLP of linear layers, not a mixture of experts."""
    names = set() if module is None else set(dict(module.named_children()))
    return "down_proj" in names and names <= _PARTS
