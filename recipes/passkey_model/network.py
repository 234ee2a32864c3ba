"""Builds the passkey model: a small Qwen2 in which one head starts as a previous-token head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDTH = 64
HEADS = 2
LAYERS = 2
THETA = 1000.0
SHARPNESS = 5.4  # scale of the previous-token head; one position further its logit is lower by 3


def build_network(vocab_size: int, window: int) -> Any:
    """Builds the model with random weights, from torch's random generator.

    Copying a key takes two steps: a head of the first layer adds the previous token to every token,
    and a head of the second layer finds the token that follows an equal one. The first head takes
    longest to learn, so the biases of query and key start it at the previous position. Training is
    free to change it.

    Args:
        vocab_size: Number of tokens of the tokenizer.
        window: Length of the longest text in training, in tokens.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=window,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:  # what a layer adds to the residual stream starts small
            small = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=0.01 if small else 0.1)
    _look_back(model, head=0)
    return model


def _look_back(model: Any, head: int) -> None:
    """Sets the biases of a head in the first layer so that it attends to the previous token.

    RoPE rotates pair i of a query at position p by the angle p f_i, and of a key at position j by j
    f_i. The query's bias is the key's bias, rotated by -f_i, so their product is largest at j = p -
    1.
    """
    attention = model.model.layers[0].self_attn
    frequencies = model.model.rotary_emb.inv_freq
    width = attention.head_dim
    rows = slice(head * width, (head + 1) * width)
    ones, zeros = torch.ones_like(frequencies), torch.zeros_like(frequencies)
    with torch.no_grad():
        attention.k_proj.bias[rows] = SHARPNESS * torch.cat([ones, zeros])
        turned = torch.cat([torch.cos(frequencies), -torch.sin(frequencies)])
        attention.q_proj.bias[rows] = SHARPNESS * turned
