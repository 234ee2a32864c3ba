"""Tiny random differential models: version 1 with several head counts, version 2 by family."""

import torch
from torch import nn

from tests.models.families import VOCABULARY

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
V1 = {
    "diffllama": {"num_key_value_heads": 4},
    "diffllama_groups_of_4": {"num_attention_heads": 16, "num_key_value_heads": 4},
    "diffllama_without_groups": {"num_key_value_heads": 8},
}
V2 = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"num_key_value_heads": 4},
}
DIFFERENTIAL = (*V1, *V2)
FEW = ("diffllama", "qwen3")


def make_differential(family: str, **overrides: object) -> nn.Module:
    """Returns a tiny random differential model in float32 and eval mode, unpatched."""
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

    from lctrain.models.differential_v2 import MODELS

    settings = _COMMON | (V1 | V2)[family] | overrides
    torch.manual_seed(0)
    if family in V1:
        model = DiffLlamaForCausalLM(DiffLlamaConfig(**settings))
    else:
        model = MODELS[family](MODELS[family].config_class(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # attention far from uniform
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(
                    20.0 if name.endswith(("q_proj.weight", "lambda_proj.weight")) else 3
                )
    return model.eval()
