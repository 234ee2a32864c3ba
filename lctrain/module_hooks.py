"""has_hooks: finds out whether a hook must see what a module computes.

A fused forward computes the results of several modules without calling them, so it is used only
where no hook would be skipped.
"""

from typing import Any

from torch import nn
from torch.nn.modules import module as _module


def has_hooks(module: Any) -> bool:
    """Returns whether a hook sees a module's inputs, its output or their gradients."""
    return isinstance(module, nn.Module) and (has_own_hooks(module) or any_global_hooks())


def has_own_hooks(module: nn.Module) -> bool:
    """Returns whether a hook is registered on a module itself."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def any_global_hooks() -> bool:
    """Returns whether a hook is registered on all modules of the process.

    `torch.nn.modules.module.register_module_forward_hook` and its kin register such hooks.
    """
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )
