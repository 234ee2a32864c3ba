"""Differential attention, version 2 (microsoft/unilm, January 2026), in four transformers families.

The families are Llama, Mistral, Qwen2 and Qwen3. Query heads 2 h and 2 h + 1 form a pair, which
shares a key and a value of width D. The pair computes ``A1 v - lambda A2 v`` with
lambda = sigmoid(x W) per token and pair, and has no norm.

Each model class derives from its family's class and replaces the attention layers. Its config has
its own model_type, and `num_attention_heads` counts the query heads of both branches. With the
attention lctrain_differential, one kernel computes both branches and their difference. With any
other attention, the layers attend with all heads, and the output projection subtracts.

This module imports transformers, so `lctrain.models` imports it only when it is needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM

from lctrain.attention.spec import ATTENTION_NAMES
from lctrain.models.differential_configs import (
    LlamaDifferentialConfig,
    MistralDifferentialConfig,
    Qwen2DifferentialConfig,
    Qwen3DifferentialConfig,
)

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class PairedLinear(nn.Linear):
    """Output projection that can first subtract each pair's second branch from the first.

    Attributes:
        lam: Lambda [B, S, H] of the H pairs of heads inside `subtracting`; None outside.
    """

    lam: Tensor | None = None

    @contextmanager
    def subtracting(self, lam: Tensor) -> Iterator[None]:
        """Context manager in which `forward` gets both branches, and subtracts them.

        Args:
            lam: Lambda [B, S, H] of the H pairs of heads.
        """
        self.lam = lam
        try:
            yield
        finally:
            self.lam = None

    def forward(self, attended: Tensor) -> Tensor:
        """Projects the output of the attention.

        Args:
            attended: [B, S, H D]; inside `subtracting`, [B, S, 2 H D] with both branches.

        Returns:
            [B, S, E].
        """
        if self.lam is not None:
            first, second = attended.unflatten(-1, (self.lam.shape[-1], 2, -1)).unbind(-2)
            attended = (first - self.lam[..., None].to(second.dtype) * second).flatten(-2)
        return super().forward(attended)


class DifferentialAttention(_Module):
    """Mixin for attention layers: adds the projection of lambda, and the subtraction."""

    config: Any
    head_dim: int
    o_proj: Any

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        if heads % (2 * key_heads):
            raise ValueError(
                "num_attention_heads must be a multiple of twice num_key_value_heads, got "
                f"{heads} and {key_heads}. It counts the query heads of both branches, and the "
                "two of a pair share a key."
            )
        width, bias = heads // 2 * self.head_dim, self.o_proj.bias is not None
        self.o_proj = PairedLinear(width, config.hidden_size, bias=bias)
        self.lambda_proj = nn.Linear(config.hidden_size, heads // 2, bias=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns the layer's output [B, S, E], and attention weights as the base class does.

        Args:
            hidden_states: [B, S, E].
            *args: Further arguments of the base class's forward.
            **kwargs: Further keyword arguments of the base class's forward.
        """
        logits = self.lambda_proj(hidden_states)
        lam = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        if self.config._attn_implementation == ATTENTION_NAMES["differential"]:
            return super().forward(hidden_states, *args, lctrain_lambda=lam, **kwargs)
        with self.o_proj.subtracting(lam):
            return super().forward(hidden_states, *args, **kwargs)


class LlamaDifferentialAttention(DifferentialAttention, LlamaAttention):
    """LlamaAttention with differential heads (version 2)."""


class MistralDifferentialAttention(DifferentialAttention, MistralAttention):
    """MistralAttention with differential heads (version 2)."""


class Qwen2DifferentialAttention(DifferentialAttention, Qwen2Attention):
    """Qwen2Attention with differential heads (version 2)."""


class Qwen3DifferentialAttention(DifferentialAttention, Qwen3Attention):
    """Qwen3Attention with differential heads (version 2)."""


class DifferentialModel(_Module):
    """Mixin for causal language models, which replaces their attention layers by differential ones.

    Attributes:
        attention_class: Class of the differential attention layers.
    """

    attention_class: ClassVar[Any]
    model: Any
    post_init: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = self.attention_class(config, index)
        self.post_init()


class LlamaDifferentialForCausalLM(DifferentialModel, LlamaForCausalLM):
    """LlamaForCausalLM with differential attention (version 2)."""

    config: LlamaDifferentialConfig
    attention_class = LlamaDifferentialAttention


class MistralDifferentialForCausalLM(DifferentialModel, MistralForCausalLM):
    """MistralForCausalLM with differential attention (version 2)."""

    config: MistralDifferentialConfig
    attention_class = MistralDifferentialAttention


class Qwen2DifferentialForCausalLM(DifferentialModel, Qwen2ForCausalLM):
    """Qwen2ForCausalLM with differential attention (version 2)."""

    config: Qwen2DifferentialConfig
    attention_class = Qwen2DifferentialAttention


class Qwen3DifferentialForCausalLM(DifferentialModel, Qwen3ForCausalLM):
    """Qwen3ForCausalLM with differential attention (version 2)."""

    config: Qwen3DifferentialConfig
    attention_class = Qwen3DifferentialAttention


MODELS: dict[str, Any] = {
    "llama": LlamaDifferentialForCausalLM,
    "mistral": MistralDifferentialForCausalLM,
    "qwen2": Qwen2DifferentialForCausalLM,
    "qwen3": Qwen3DifferentialForCausalLM,
}
"""model_type of a family -> class of its differential models."""
