"""Fixtures of the generation tests: a tiny Llama that never ends, patched or not."""

import pytest
import torch

import lctrain
from lctrain.generation import continuous, task
from lctrain.generation.continuous import ContinuousBatch
from lctrain.generation.options import SamplingOptions
from lctrain.generation.road import find_cache
from lctrain.generation.task import GenerationTask


@pytest.fixture
def endless(make_llama):
    """Returns a factory of tiny Llamas in eval mode without an end token: endless(**config)."""

    def make(**config):
        model = make_llama(**config)
        model.generation_config.eos_token_id = None
        model.config.eos_token_id = None
        return model

    return make


@pytest.fixture
def patched(endless):
    """Returns a tiny Llama that generates by continuous batching."""
    model = endless()
    lctrain.patch_model(model)
    return model


@pytest.fixture
def make_batch(patched):
    """Returns a factory of ContinuousBatch: make_batch(prompts, pages=None, ...)."""

    def make(prompts, pages=None, capture=None, batch_size=64, max_new_tokens=8, **options):
        shape = find_cache(patched)
        task = GenerationTask(
            prompts,
            range(len(prompts)),
            SamplingOptions(**options),
            max_new_tokens,
            batch_size=batch_size,
        )
        gib = None if pages is None else pages * shape.page_bytes / 2**30
        return ContinuousBatch(patched, task, shape, gib, capture)

    with torch.no_grad():
        yield make


@pytest.fixture
def nan_memory(monkeypatch):
    """Fills new memory with NaN, and accepts distributions of NaN."""
    for module in (continuous, task):
        monkeypatch.setattr(module, "require_distributions", lambda *_: None)
    empty = torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def letters():
    """Returns a tokenizer of 97 tokens of one byte each; token 5 is "&"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(33 + index) for index in range(94)] + ["\u0120", "\u00a1", "\u00a2"]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
