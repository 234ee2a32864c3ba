"""BatchInvariantSwap: gives a token the same bits in every batch, at every position of a pack.

On a GPU, the fused norms, rotary embeddings and MLPs compute rows alone, and so does attention on
the portable kernels. This swap changes the linear layers. On a CPU, PyTorch computes the last
numbers of a tensor without vector instructions, so the bits of elementary functions depend on a
token's place. There, the swap computes MLPs and rotary embeddings token by token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.batch_invariant import BatchInvariantLinear, is_linear
from lctrain.models import fused_modules
from lctrain.models.architectures import attention_layers
from lctrain.models.code import own_forward, parameters, same_code
from lctrain.models.frequencies import length_dependent
from lctrain.models.fused import FusedSwap, fused_class, has_own_forward
from lctrain_kernels.linear.by_row import by_row

COVERED = (
    "Covered are causal models with the layers of Llama, Mistral, Qwen2 or Qwen3, with dense "
    "weights or LoRA. Pass batch_invariant=False."
)


class RowwiseMLP:
    """Mixin for a fused MLP: on a CPU, it computes token by token."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns the MLP's output for x [..., E], as the module's own forward does."""
        forward: Any = super().forward  # type: ignore[misc]
        if x.device.type == "cuda":
            return forward(x, residual)
        rows = [x.reshape(-1, x.shape[-1])]
        if residual is not None:
            rows.append(residual.reshape(-1, residual.shape[-1]))
        return by_row(forward, *rows).view(*x.shape[:-1], -1)


class RowwiseRotary:
    """Mixin for a rotary embedding: on a CPU, it computes token by token."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines [B, S, R] for positions [B, S], in the dtype of x."""
        forward: Any = super().forward  # type: ignore[misc]
        if x.device.type == "cuda":
            return forward(x, position_ids)
        table = by_row(
            lambda position: torch.stack(forward(x, position[:, None]), -1)[0],
            position_ids.reshape(-1),
        )
        cos, sin = table.unflatten(0, position_ids.shape).unbind(-1)
        return cos.contiguous(), sin.contiguous()


class BatchInvariantSwap:
    """Makes the linear layers of a model with fused modules independent of the batch.

    It implements the protocol `lctrain.models.swap.Swap`.

    Attributes:
        swapped: Triples (module, its class before, its class now), one per changed module.

    Args:
        model: A transformers model.
        fused: The swap that fuses its modules. It must be applied before this one.
        dropout: Dropout probability of the attention; None takes that of the model's config.

    Raises:
        ValueError: if the model's attention has dropout, or frequencies that depend on the length.
            `apply` raises one for a module that is not covered.
    """

    name = "batch_invariant"

    def __init__(self, model: Any, fused: FusedSwap, dropout: float | None = None) -> None:
        config = model.config.get_text_config()
        dropout = getattr(config, "attention_dropout", 0.0) if dropout is None else dropout
        if dropout:
            raise ValueError(
                f"dropout must be 0 with batch_invariant=True, got {dropout}: a rollout has none. "
                "Pass dropout=0.0."
            )
        if changing := next(iter(length_dependent(model)), None):
            raise ValueError(
                "batch_invariant=True needs rotary frequencies that do not depend on the length, "
                f"got those of {changing}: a token's bits would change as its document grows. "
                "Set another rope_type in the model's config."
            )
        self._model = model
        self._fused = fused
        self.swapped: list[tuple[Any, type, type]] = []

    def apply(self) -> None:
        """Changes the class of the linear layers, the MLPs and the rotary embedding.

        Raises:
            ValueError: if a module is not known to compute every token alone.
        """
        model = self._model
        own = {module: kind for module, kind, _ in self._fused.swapped}
        self._require_covered(own)
        for module in list(model.modules()):
            if type(module) is nn.Linear:
                self._swap(module, BatchInvariantLinear)
            elif isinstance(module, fused_modules.GatedMLP):
                self._swap(module, fused_class(type(module), RowwiseMLP))
            elif _is_rotary(module):
                self._swap(module, fused_class(type(module), RowwiseRotary))

    def undo(self) -> None:
        """Restores the class of every module."""
        for module, before, now in reversed(self.swapped):
            if type(module) is now:
                module.__class__ = before
        self.swapped = []

    def describe(self) -> str:
        """Returns the number of changed modules per class as text, such as "113 Linear"."""
        counts = Counter(before.__name__ for _, before, _ in self.swapped)
        return ", ".join(f"{count} {name}" for name, count in counts.items())

    def _swap(self, module: Any, kind: Any) -> None:
        self.swapped.append((module, type(module), kind))
        module.__class__ = kind

    def _require_covered(self, own: dict[nn.Module, type]) -> None:
        """Raises a ValueError if a module is not known to compute every token alone.

        Args:
            own: Class before the fusion of every fused module.
        """
        for name, module, reason in self._uncovered(own):
            kind = own.get(module, type(module)).__name__
            raise ValueError(
                f"batch_invariant=True needs modules that compute every token alone, got {kind} "
                f"({name or 'the model'}), {reason}. {COVERED}"
            )

    def _uncovered(self, own: dict[nn.Module, type]) -> Iterator[tuple[str, nn.Module, str]]:
        """Yields name, module and reason of what is not covered."""
        model = self._model
        layers = attention_layers(model)
        for name, layer in layers.items():
            if not _attends_like_llama(own.get(layer, type(layer))):
                yield name, layer, "an attention layer of another kind"
        blocks: list[Any] = [
            one for one in model.modules() if isinstance(one, fused_modules.ResidualLayer)
        ]
        if len(blocks) != len(layers):
            yield "", model, "whose decoder layers are not all Llama's"
        activations = {getattr(block.mlp, "act_fn", None) for block in blocks}
        for name, module in model.named_modules():
            if is_linear(module) and has_own_forward(module):
                yield name, module, "whose forward was replaced"
            elif not (module in own or module in activations or _is_plain(module)):
                yield name, module, "which may not"
        head = model.get_output_embeddings()
        if not is_linear(head):
            yield "", model, "whose output embedding is no torch.nn.Linear"


def _is_plain(module: nn.Module) -> bool:
    """Returns whether a module does nothing, selects rows, or is a linear layer or a rotation."""
    from transformers import PreTrainedModel

    if is_linear(module) or _is_adapter(module) or _is_rotary(module):
        return True
    kinds = (nn.Embedding, nn.ModuleList, nn.ModuleDict, nn.ParameterDict, nn.Dropout, nn.Identity)
    return type(module) in kinds or isinstance(module, PreTrainedModel)


def _is_adapter(module: nn.Module) -> bool:
    """Returns whether a module is a linear layer with LoRA.

    Its forward calls the linear layers inside, which are modules of their own.
    """
    kind = type(module)
    return kind.__module__ == "peft.tuners.lora.layer" and kind.__name__ == "Linear"


def _is_rotary(module: nn.Module) -> bool:
    """Returns whether a module is a rotary embedding whose forward takes states and positions."""
    if not isinstance(getattr(module, "inv_freq", None), Tensor):
        return False
    return list(parameters(module)) == ["x", "position_ids"]


def _attends_like_llama(own: type) -> bool:
    """Returns whether an attention class has the forward of a family that is covered."""
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.models.mistral.modeling_mistral import MistralAttention
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    forward = own_forward(own)
    known = (LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention)
    return forward is not None and any(same_code(forward, one.forward) for one in known)
