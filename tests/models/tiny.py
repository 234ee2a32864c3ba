"""Tiny random models of any transformers family, built from its config class alone.

tiny_config("qwen3_moe") shrinks every size in the family's default config. The architecture stays:
kinds of layers, windows, sinks, softcaps, routers and position embeddings.
"""

from typing import Any

import torch
from torch import nn

VOCABULARY = 61
WINDOW = 5
MAX_PARAMETERS = 8_000_000
_BY_SIZE = {
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers depth "
    "num_blocks encoder_layers num_encoder_layers depths encoder_num_layers conformer_num_blocks "
    "num_attention_heads n_head n_heads num_heads num_local_heads decoder_attention_heads "
    "encoder_attention_heads attention_heads num_decoder_attention_heads mamba_n_heads "
    "num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads mamba_num_heads "
    "linear_num_key_heads linear_num_heads n_mamba_heads index_n_heads conf_num_attention_heads "
    "num_query_groups swa_num_query_groups num_experts num_local_experts n_routed_experts "
    "moe_num_experts zero_expert_num patch_size block_size qk_rope_head_dim rotary_dim "
    "laurel_rank",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok "
    "num_experts_per_token moe_topk moe_k n_shared_experts num_shared_experts eos_token_id "
    "moe_num_shared_experts sep_token_id global_attn_every_n_layers max_window_layers "
    "type_vocab_size",
    32: "hidden_size out_hidden_size n_embd d_model emb_dim dim embed_dim word_embed_proj_dim "
    "embedding_size lru_width embedding_dim projection_dim input_embedding_size "
    "output_embedding_size attention_hidden_size backbone_hidden_size conf_hidden_size",
    48: "intermediate_size moe_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff dff "
    "n_inner dim_ff ffn_hidden_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "intermediate_size_mlp dense_intermediate_size shared_intermediate_size d_inner "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size",
    8: "head_dim kv_channels d_kv d_head dim_head attention_head_size swa_head_dim image_size "
    "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim "
    "index_head_dim qk_nope_head_dim mamba_d_state ssm_state_size state_size mamba_chunk_size "
    "hidden_size_per_layer_input pronunciation_embed_dim shape_embed_dim o_lora_rank num_mel_bins",
    16: "query_pre_attn_scalar global_head_dim pronunciation_vocab_size shape_vocab_size",
    12: "q_lora_rank kv_lora_rank qk_head_dim",
    64: "max_position_embeddings n_positions n_ctx max_target_positions max_seq_len "
    "context_length model_max_length original_max_position_embeddings index_topk rel_extent "
    "max_source_positions mamba_d_ssm",
    VOCABULARY: "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    1: "n_group n_groups num_expert_group topk_group mamba_n_groups mamba_ngroups num_codebooks "
    "num_mem_blocks first_k_dense_replace moe_layer_start_index num_dense_layers n_langs "
    "bos_token_id cls_token_id num_global_key_value_heads",
    WINDOW: "sliding_window window_size local_attention attention_window_size "
    "sliding_window_size attention_chunk_size",
    6: "v_head_dim",
    0: "pad_token_id num_kv_shared_layers",
}
_SIZES = {name: size for size, names in _BY_SIZE.items() for name in names.split()}
_M_ROPE = (
    "qwen2_vl_text qwen2_5_vl_text qwen2_5_omni_text paddleocr_vl_text glm4v_text glm4v_moe_text "
    "glm_ocr_text"
)
_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {"rope_parameters": _AXES} for name in _M_ROPE.split()},
    "bamba": {"mamba_d_head": 16},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {
        "head_dim": 8,
        "n_routed_experts": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots3_note": {"adapter_in_dim": 32},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "phimoe": {"sliding_window": WINDOW},
    "falcon_h1": {"mamba_d_head": 16},
    "granitemoehybrid": {"mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 16},
    "esm": {"vocab_size": VOCABULARY, "token_dropout": False, "position_embedding_type": "rotary"},
    "esmc": {"num_key_value_heads": 4},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": {"linear_num_key_heads": 4, "linear_num_value_heads": 4},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family wants beside tiny sizes, by model_type."""


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Returns a family's default config with every size made tiny.

    Args:
        model_type: Key of transformers' CONFIG_MAPPING.
        **overrides: Arguments of the config class, which take precedence.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _shrink(CONFIG_MAPPING[model_type], overrides)


def config_for(model_class: type, config: Any) -> Any:
    """Returns the config of a model class; for a text model, the text part of the config."""
    wanted = getattr(model_class, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    return config.get_text_config(decoder=True)


def tiny_model(model_type: str, model_class: type, **overrides: Any) -> nn.Module:
    """Returns a random model in float32 and eval mode, whose attention is far from uniform.

    Raises:
        ValueError: if the model stays large, because `tiny_config` does not know some size.
    """
    attention = overrides.pop("attn_implementation", None)
    config = config_for(model_class, tiny_config(model_type, **overrides))
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{model_type} must be tiny, got {size} parameters. Extend _SIZES.")
    config = config_for(
        model_class, tiny_config(model_type, **overrides)
    )  # models write into their configs
    config._experts_implementation = "eager"  # the others know no float64
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(0)
    model = model_class(config).eval()
    sharpen(model)
    return model


@torch.no_grad()
def sharpen(model: nn.Module) -> None:
    """Moves random weights away from zero, so that each layer has a visible effect."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.dim() > 1:
            parameter.copy_(0.1 * noise)
        else:
            parameter.add_(0.1 * noise)


def _shrink(config_class: type, overrides: dict[str, Any]) -> Any:
    default = config_class()
    values = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    layers = _layer_count(default)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            arguments[name] = _shrink(type(value), {})
        elif isinstance(value, list) and layers is not None and len(value) == layers:
            arguments[name] = _shorten(value)
        elif name in _SIZES and value is not None:
            arguments[name] = _SIZES[name]
        elif name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            arguments[name] = VOCABULARY - 1
        elif name.endswith("_token_id") and isinstance(value, list):
            arguments[name] = _SIZES.get(name, VOCABULARY - 1)
    if "kv_lora_rank" in arguments and values.get("num_key_value_heads") is not None:
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]  # latent attention
        if values.get("head_dim") == values.get("qk_rope_head_dim"):
            arguments["head_dim"] = arguments["qk_rope_head_dim"]  # of the rotary embedding
    family = _FAMILIES.get(config_class.model_type, {})
    return config_class(**(arguments | family | overrides))


def _layer_count(config: Any) -> int | None:
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"):
        count = getattr(config, name, None)
        if isinstance(count, int):
            return count
    return None


def _shorten(values: list[Any]) -> list[Any]:
    """Returns four entries of a per-layer list, with each of the first four kinds among them."""
    sorts = list(dict.fromkeys(map(str, values)))
    firsts = [next(value for value in values if str(value) == sort) for sort in sorts][:4]
    return (firsts + values)[:4] if len(firsts) == 4 else (values[: 4 - len(firsts)] + firsts)[:4]
