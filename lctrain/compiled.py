"""is_compiled: says whether torch.compile compiles the calls of a module."""

from __future__ import annotations

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Returns whether `torch.compile(module)` made a module, or `module.compile()` changed it."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
