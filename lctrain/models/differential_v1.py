"""Version 1 of differential attention in transformers' DiffLlama: one launch instead of two.

Imports transformers; `lctrain.models` reaches it lazily.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.diffllama.modeling_diffllama import (
    DiffLlamaAttention,
    apply_rotary_pos_emb,
)

from lctrain.attention.differential import differential_attention_forward
from lctrain.attention.spec import ATTENTION_NAMES
from lctrain.models.cache import given_cache, without_cache


class FusedDiffLlamaAttention(DiffLlamaAttention):
    """The layers of a patched DiffLlama: DiffLlamaAttention with another forward.

    transformers' own forward calls attention once per half of the values, which an attention
    function cannot change. Weights and state are those of the base class: patching sets the
    `__class__` of a layer, and unpatching restores it.
    """

    def forward(  # type: ignore[override]  # the cache's name depends on the transformers release
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """See DiffLlamaAttention.forward; hidden_states [B, S, E] -> [B, S, E]."""
        if self.config._attn_implementation != ATTENTION_NAMES["differential"]:
            return super().forward(  # the attention was set to something else meanwhile
                hidden_states, position_embeddings, attention_mask, **kwargs
            )
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = given_cache(kwargs)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        out, _ = differential_attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            lctrain_lambda=self._lambda(query.dtype),
            lctrain_halves=True,
            **without_cache(kwargs),
        )
        out = (1 - self.lambda_init) * self.groupnorm(out)
        return self.o_proj(out.flatten(2)), None

    def _lambda(self, dtype: torch.dtype) -> Tensor:
        """Returns lambda, a scalar in float32 or wider, unlike transformers, which rounds it."""
        state = torch.promote_types(dtype, torch.float32)
        first = torch.sum(self.lambda_q1 * self.lambda_k1, dim=-1, dtype=state).exp()
        second = torch.sum(self.lambda_q2 * self.lambda_k2, dim=-1, dtype=state).exp()
        return first - second + self.lambda_init
