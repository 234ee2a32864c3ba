"""BatchInvariantLinear: an nn.Linear whose bits of a token do not depend on the other tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class BatchInvariantLinear(nn.Linear):
    """A linear layer that gives a row the same bits alone, in any batch and at any position.

    `patch_model(model, batch_invariant=True)` gives the linear layers of a model this class.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Returns `input @ weight.T + bias`, [..., N], for an input [..., K].

        Raises:
            ValueError: if the weight is divided over ranks or quantized.
        """
        from lctrain.kernels import batch_invariant_linear

        for tensor in (input, self.weight):
            if type(tensor) not in (Tensor, nn.Parameter):
                raise ValueError(
                    "a batch-invariant layer needs plain tensors, got a "
                    f"{type(tensor).__name__}: ranks that divide a product add up its parts. Pass "
                    "batch_invariant=False, or gather the weights as FSDP2 does."
                )
        return batch_invariant_linear(input, self.weight, self.bias)


def is_linear(module: Any) -> bool:
    """Returns whether a module is a plain linear layer of PyTorch, batch-invariant or not."""
    return type(module) in (nn.Linear, BatchInvariantLinear)


def is_batch_invariant(model: nn.Module) -> bool:
    """Returns whether a model is patched with batch_invariant=True."""
    return any(type(module) is BatchInvariantLinear for module in model.modules())


def require_batch_invariant(model: nn.Module) -> None:
    """Raises a ValueError if a batch-invariant model is compiled, or has other linear layers.

    Args:
        model: A model for which is_batch_invariant is True.
    """
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            raise ValueError(
                f"a batch-invariant model must not be compiled, got {name or 'the model'} of "
                f"{type(module).__name__}: a compiler fuses operations in another way per graph. "
                "Compile it without batch_invariant."
            )
        if isinstance(module, nn.Linear) and type(module) is not BatchInvariantLinear:
            raise ValueError(
                "all linear layers must be batch-invariant, got the "
                f"{type(module).__name__} {name}, which came after patch_model. Add adapters "
                "first, and patch the model then."
            )


def no_invariant_head(model: nn.Module) -> ValueError:
    """Returns the error for a batch-invariant model whose logits are no known function."""
    return ValueError(
        "a batch-invariant model must have one linear layer between hidden states and logits, got "
        f"{type(model).__name__}, whose logits are computed in another way. Leave its output "
        "embedding without adapters and hooks, or patch it without batch_invariant."
    )
