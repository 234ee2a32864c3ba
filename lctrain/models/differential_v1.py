"""FusedDiffLlamaAttention: DiffLlama's differential attention (version 1) in one kernel launch.

This module imports transformers, so `lctrain.models` imports it only when it is needed.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.diffllama.modeling_diffllama import (
    DiffLlamaAttention,
    apply_rotary_pos_emb,
)

from lctrain.attention.cache_step import STEP_ARGUMENT
from lctrain.attention.differential import differential_attention_forward
from lctrain.attention.spec import ATTENTION_NAMES
from lctrain.models.cache import given_cache, without_cache


class FusedDiffLlamaAttention(DiffLlamaAttention):
    """The attention layer of a patched DiffLlama: DiffLlamaAttention with a fused forward.

    transformers' own forward calls the attention function twice, once per half of the values; this
    forward calls it once. Parameters and state dict are those of DiffLlamaAttention. Patching sets
    the `__class__` of a layer to this class, and unpatching restores it.
    """

    def forward(  # type: ignore[override]  # the cache argument's name depends on the release
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns the layer's output [B, S, E], and None in place of attention weights.

        Args:
            hidden_states: [B, S, E].
            position_embeddings: Cosines and sines of RoPE, each [B or 1, S, D].
            attention_mask: The result of flash_attention_mask.
            **kwargs: Further arguments, as for DiffLlamaAttention.forward.
        """
        if self.config._attn_implementation != ATTENTION_NAMES["differential"]:
            return super().forward(  # set_attn_implementation chose another attention
                hidden_states, position_embeddings, attention_mask, **kwargs
            )
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = None if STEP_ARGUMENT in kwargs else given_cache(kwargs)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            kwargs = without_cache(kwargs)
        out, _ = differential_attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            lctrain_lambda=self._lambda(query.dtype),
            lctrain_halves=True,
            **kwargs,
        )
        out = (1 - self.lambda_init) * self.groupnorm(out)
        return self.o_proj(out.flatten(2)), None

    def _lambda(self, dtype: torch.dtype) -> Tensor:
        """Returns the layer's lambda, a scalar in float32, or float64 if `dtype` is float64.

        transformers rounds lambda to the dtype of the queries; this method does not.
        """
        state = torch.promote_types(dtype, torch.float32)
        first = torch.sum(self.lambda_q1 * self.lambda_k1, dim=-1, dtype=state).exp()
        second = torch.sum(self.lambda_q2 * self.lambda_k2, dim=-1, dtype=state).exp()
        return first - second + self.lambda_init
