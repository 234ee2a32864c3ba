"""Tests generation over paged caches and caches of fixed size on a GPU, in bfloat16."""

import copy

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tests.models.attentions import ATTENTIONS, patched_model

OPTIONS = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
LENGTHS = [300, 40, 7, 520]
CHUNKS = {"chunk_size": 192, "local_size": 64}

pytestmark = pytest.mark.gpu


def llama():
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=2)).eval()


def require_probable(model, prompt, found):
    """Fails if a token's exact logit is below the highest by more than two logits may be wrong.

    Args:
        model: The patched model in bfloat16.
        prompt: Ids of the prompt.
        found: Ids of its greedy completion.
    """
    ids = torch.tensor([prompt + found], device=model.device)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        logits = [at(ids, use_cache=False).logits[0, len(prompt) - 1 : -1] for at in (model, exact)]
    error = (logits[0] - logits[1]).abs().max()
    chosen = logits[1].gather(1, ids[0, len(prompt) :, None])[:, 0]
    assert float((logits[1].amax(1) - chosen).max()) <= 2 * (2 * error)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_batches_with_graphs_and_block_tables(attention, device):
    options = CHUNKS if attention == "dual_chunk" else {}
    prompts = [torch.randint(3, 512, (length,)).tolist() for length in LENGTHS]
    batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)
    with patched_model(llama(), attention, **options) as model:
        model.to(device, torch.bfloat16)
        found = model.generate_batch(
            prompts,
            generation_config=GenerationConfig(**OPTIONS),
            continuous_batching_config=batching,
        )
        for name, result in found.items():
            assert result.error is None
            require_probable(model, prompts[int(name.split("_")[1])], result.generated_tokens)
    assert len(found) == len(prompts)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_compiled_steps_on_a_static_cache(attention, device):
    options = CHUNKS if attention == "dual_chunk" else {}
    tokens = torch.randint(3, 512, (2, 300), device=device)
    with patched_model(llama(), attention, **options) as model:
        model.to(device, torch.bfloat16)
        torch._dynamo.reset()  # code compiled for the model of another test is not a recompilation
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = model.generate(tokens, cache_implementation="static", **OPTIONS)
        for row in found.tolist():
            require_probable(model, row[:300], row[300:])
