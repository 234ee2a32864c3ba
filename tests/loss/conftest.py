import pytest
import torch
import transformers

from lctrain.batch import PackedBatch

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "dropout": 0.0}
ARCHITECTURES = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "gemma2-softcap": ("Gemma2", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "granite-logits-scaling": ("Granite", {"logits_scaling": 3.0}),
    "cohere-logit-scale": ("Cohere", {"logit_scale": 0.25}),
    "phi-head-with-bias": ("Phi", {}),
    "gpt2": ("GPT2", NO_DROPOUT),
    "opt-calls-past-its-base-model": ("OPT", {**NO_DROPOUT, "ffn_dim": 48}),
    "mixtral-experts": ("Mixtral", {"num_local_experts": 4, "experts_implementation": "eager"}),
}


def build(name: str, sizes: dict):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model


def build_architecture(architecture: str, **overrides):
    """Returns a tiny random causal LM of one of ARCHITECTURES."""
    name, changes = ARCHITECTURES[architecture]
    return build(name, {**SIZES, **changes, **overrides})


@pytest.fixture
def make_model():
    """Returns make_model(architecture, **config): a tiny random causal LM in training mode."""

    def make(architecture: str = "llama", **overrides):
        return build_architecture(architecture, **overrides).train()

    return make


@pytest.fixture
def one_document() -> PackedBatch:
    """A batch with one document of 30 tokens, which unpatched models read correctly too."""
    generator = torch.Generator().manual_seed(0)
    return PackedBatch.from_documents([torch.randint(97, (30,), generator=generator)])
