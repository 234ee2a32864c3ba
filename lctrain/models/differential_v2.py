"""Version 2 of differential attention (microsoft/unilm, January 2026) in Llama, Qwen2 and Qwen3.

Heads (2 h, 2 h + 1) are a pair that shares a key and a value of D:
``out = A1 v - lambda A2 v``, lambda = sigmoid(x W) per token and pair, no norm. A model is its
transformers class with other attention layers, and its config that class's, with a model_type of
its own and with `num_attention_heads` counting the heads of both branches. With any attention but
lctrain_differential the layers attend over all heads at once and subtract afterwards.

Imports transformers; `lctrain.models` reaches it lazily.
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
    """An output projection that subtracts second branches first, where attention did not."""

    lam: Tensor | None = None

    @contextmanager
    def subtracting(self, lam: Tensor) -> Iterator[None]:
        """Context in which inputs have both branches; lam is [B, S, H]."""
        self.lam = lam
        try:
            yield
        finally:
            self.lam = None

    def forward(self, attended: Tensor) -> Tensor:
        """[B, S, H D], or both branches [B, S, 2 H D] -> [B, S, E]."""
        if self.lam is not None:
            first, second = attended.unflatten(-1, (self.lam.shape[-1], 2, -1)).unbind(-2)
            attended = (first - self.lam[..., None].to(second.dtype) * second).flatten(-2)
        return super().forward(attended)


class DifferentialAttention(_Module):
    """Mixin of the attention layers: the forward of the class it is mixed into, and lambda."""

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
        """As the forward of the class it is mixed into; hidden_states [B, S, E] -> [B, S, E]."""
        logits = self.lambda_proj(hidden_states)
        lam = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        if self.config._attn_implementation == ATTENTION_NAMES["differential"]:
            return super().forward(hidden_states, *args, lctrain_lambda=lam, **kwargs)
        with self.o_proj.subtracting(lam):
            return super().forward(hidden_states, *args, **kwargs)


class LlamaDifferentialAttention(DifferentialAttention, LlamaAttention):
    """LlamaAttention of version 2."""


class MistralDifferentialAttention(DifferentialAttention, MistralAttention):
    """MistralAttention of version 2."""


class Qwen2DifferentialAttention(DifferentialAttention, Qwen2Attention):
    """Qwen2Attention of version 2."""


class Qwen3DifferentialAttention(DifferentialAttention, Qwen3Attention):
    """Qwen3Attention of version 2."""


class DifferentialModel(_Module):
    """Mixin of the causal language models that have differential attention layers."""

    attention_class: ClassVar[Any]
    model: Any
    post_init: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = self.attention_class(config, index)
        self.post_init()


class LlamaDifferentialForCausalLM(DifferentialModel, LlamaForCausalLM):
    """LlamaForCausalLM of version 2."""

    config: LlamaDifferentialConfig
    attention_class = LlamaDifferentialAttention


class MistralDifferentialForCausalLM(DifferentialModel, MistralForCausalLM):
    """MistralForCausalLM of version 2."""

    config: MistralDifferentialConfig
    attention_class = MistralDifferentialAttention


class Qwen2DifferentialForCausalLM(DifferentialModel, Qwen2ForCausalLM):
    """Qwen2ForCausalLM of version 2."""

    config: Qwen2DifferentialConfig
    attention_class = Qwen2DifferentialAttention


class Qwen3DifferentialForCausalLM(DifferentialModel, Qwen3ForCausalLM):
    """Qwen3ForCausalLM of version 2."""

    config: Qwen3DifferentialConfig
    attention_class = Qwen3DifferentialAttention


MODELS: dict[str, Any] = {
    "llama": LlamaDifferentialForCausalLM,
    "mistral": MistralDifferentialForCausalLM,
    "qwen2": Qwen2DifferentialForCausalLM,
    "qwen3": Qwen3DifferentialForCausalLM,
}
"""model_type of a family -> its model of version 2."""
