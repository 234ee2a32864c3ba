"""Tiny random models of every family that the tests patch, and packs as their inputs."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lctrain.batch import PackedBatch
from tests.float64 import float64_throughout

VOCABULARY = 61
LENGTHS = (6, 1, 11, 7)  # a single token among them; longer than the windows below
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "attn_implementation": "eager",  # SDPA of older versions leaves the softcap out
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 5}),
    "gpt_oss": (
        "GptOss",
        {
            "sliding_window": 4,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "experts_implementation": "eager",
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 12,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
            "first_k_dense_replace": 2,
        },
    ),
    "bert": ("Bert", {}),
    "modernbert": ("ModernBert", {"local_attention": 4, "global_attn_every_n_layers": 2}),
}
FAMILIES = tuple(_FAMILIES)
ROTARY = ("llama", "qwen2", "qwen3", "mistral")  # those that dual chunk attention is tested with
CAUSAL = tuple(name for name in FAMILIES if name not in ("bert", "modernbert"))


def make_model(family: str, **overrides: object) -> nn.Module:
    """Returns a tiny random model of the family, in float32 and eval mode."""
    import transformers

    name, settings = _FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SIZES | settings | overrides))
    head = "Model" if family in ("bert", "modernbert") else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention is far from uniform
            parameter.mul_(3.0) if parameter.dim() > 1 else parameter.add_(
                0.1 * torch.randn_like(parameter)
            )
    return model


def make_rotary_model(family: str, **overrides: object) -> nn.Module:
    """Returns make_model(...) for a family of ROTARY, with full attention in every layer."""
    return make_model(family, **({"sliding_window": None} | overrides))


def padded(documents: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Returns input_ids and attention_mask [B, S] of documents padded on the left or the right."""
    width = max(len(tokens) for tokens in documents)
    rows, mask = torch.zeros((len(documents), width), dtype=torch.int64), []
    for row, tokens in zip(rows, documents, strict=True):
        start = 0 if side == "right" else width - len(tokens)
        row[start : start + len(tokens)] = tokens
        mask.append([int(start <= i < start + len(tokens)) for i in range(width)])
    return rows, torch.tensor(mask)


def make_documents(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> list[Tensor]:
    """Returns one row of random tokens per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def outputs(model: nn.Module, **inputs: object) -> Tensor:
    """Returns the logits [B, S, V], or the hidden states [B, S, E] of an encoder."""
    result = model(**inputs)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def packed_outputs(model: nn.Module, documents: Sequence[Tensor], **inputs: object) -> Tensor:
    """Returns the outputs [T, V] of documents in one pack."""
    arguments = PackedBatch.from_documents(documents).model_kwargs()
    return outputs(model, **(arguments | inputs))[0]


def separate_outputs(model: nn.Module, documents: Sequence[Tensor]) -> Tensor:
    """Returns the outputs [T, V] of documents, from one forward per document."""
    return torch.cat([outputs(model, input_ids=tokens[None])[0] for tokens in documents])


def gradients(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns forward() and all parameter gradients, for a fixed random output gradient."""
    model.zero_grad()
    result = forward()
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(result.shape, generator=generator, dtype=torch.float64)
    (result * cotangent.to(result)).sum().backward()
    found = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return result.detach(), found


def exact_gradients(
    model: nn.Module, packings: Sequence[Sequence[Tensor]], float32_frequencies: bool = False
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Returns `gradients` for each pack, from a float64 copy of the model.

    Args:
        model: The model.
        packings: The documents of each pack.
        float32_frequencies: See `float64_throughout`; needed by dual chunk attention.
    """
    exact = copy.deepcopy(model).double()
    with float64_throughout(float32_frequencies):
        return [gradients(exact, lambda d=d: packed_outputs(exact, d)) for d in packings]
