"""Tests how lctrain.generate reads its arguments: errors come before the model runs."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import lctrain
from lctrain.module import LongContextModule

PROMPTS = [[5, 6, 7], [9, 10]]


@pytest.fixture
def model(make_llama):
    return make_llama()


def gpt2(positions=16, **options):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": positions}
    return GPT2LMHeadModel(GPT2Config(**sizes, **options))


def test_arrays_and_tensors_are_token_ids(model):
    expected = lctrain.generate(model, [[3, 4]], max_new_tokens=2)
    for prompts in ([np.array([3, 4])], [[np.int32(3), 4]], torch.tensor([[3, 4]])):
        assert lctrain.generate(model, prompts, max_new_tokens=np.int64(2)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0, or finite and at least 1e-06, got -1.0"),
        ({"temperature": 1e-45}, "temperature must be 0, or finite and at least 1e-06"),
        ({"temperature": float("nan")}, "temperature must be 0, or finite and at least"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"top_k": -1}, "top_k must be an int of at least 0, got -1"),
        ({"top_k": True}, "top_k must be a number, got True"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": None}, "top_p must be a number, got None"),
        ({"min_p": 2.0}, "min_p must be from 0 to 1, got 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and above 0, got 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an int of at least 1, got 0"),
        ({"max_new_tokens": True}, "max_new_tokens must be an int of at least 1, got True"),
        ({"batch_size": 0}, "batch_size must be an int of at least 1, got 0"),
        ({"batching": "x"}, "batching must be one of auto, continuous, padded, got 'x'"),
        ({"cache_gib": 0}, "cache_gib must be a finite number above 0, got 0"),
        ({"cache_gib": True}, "cache_gib must be a finite number above 0, got True"),
        ({"shared_prefixes": True}, "shared_prefixes must be one of auto, always, never, got True"),
        ({"seeds": [1]}, r"seeds must have one number per completion \(2\), got 1"),
        (
            {"seeds": [1, 2], "samples": 2},
            r"seeds must have one number per completion \(4\), got 2",
        ),
        ({"samples": 0}, "samples must be an int of at least 1, got 0"),
        ({"seeds": None}, "seeds must be an int, or a list with one per completion, got None"),
        ({"seeds": "ab"}, "seeds must be an int, or a list with one per completion, got 'ab'"),
        ({"seeds": [1, 2**70]}, f"seeds must be integers of 64 bits, got {2**70}"),
        ({"stop": ["x"]}, "tokenizer must be given with stop strings"),
        ({"stop": "ab"}, "stop must be a list of texts of at least one character, got 'ab'"),
        ({"stop": [""]}, "stop must be a list of texts of at least one character"),
        ({"stop": None}, r"stop must be a list of texts .*, got None\. Write .*or \[\] for none"),
        ({"stop": 5}, "stop must be a list of texts of at least one character, got 5"),
        ({"eos_token_id": 1.5}, "eos_token_id must name token ids from 0 to .*, got 1.5"),
        ({"cuda_graphs": "no"}, "cuda_graphs must be True or False, got 'no'"),
        ({"eos_token_id": "x"}, "eos_token_id must name token ids from 0 to .*, got 'x'"),
        ({"eos_token_id": [2, -1]}, "eos_token_id must name token ids from 0 to .*, got -1"),
        ({"prompts": ["text"]}, "tokenizer must be given with prompts of text"),
        ({"prompts": [[]]}, "prompts must be lists of at least one token id"),
        ({"prompts": [[1.5]]}, "prompts must be lists of token ids, which are ints, got .1.5.. Pa"),
        ({"prompts": [[True]]}, "prompts must be lists of token ids, which are ints, got .True."),
        ({"prompts": torch.ones(1, 1, 2)}, "prompts must be lists of token ids, which are ints"),
        ({"prompts": {(1, 2)}}, "prompts must be a list of prompts, got .*Put them in an order"),
        ({"prompts": [1, 2]}, "prompts must be a list of prompts, each a list.*got the prompt 1"),
        ({"prompts": torch.tensor([1])}, "prompts must be a list of prompts, each a list"),
        ({"prompts": [{"input_ids": [1]}]}, "prompts must be a list of prompts, each a list"),
        ({"prompts": "text"}, "prompts must be a list of prompts, got 'text'"),
        ({"prompts": None}, "prompts must be a list of prompts, got 'None'"),
        ({"prompts": [[1], [10**6]]}, "prompts must have token ids from 0 to .*, got 1000000"),
        ({"prompts": [[1, -1]]}, "prompts must have token ids from 0 to .*, got -1"),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        lctrain.generate(model, **{"prompts": PROMPTS, **arguments})


def test_a_name_is_no_tokenizer(model):
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer of transformers, got 'x'"):
        lctrain.generate(model, ["text"], tokenizer="x")


def test_a_function_without_decode_is_no_tokenizer(model):
    """Its absence would show when all completions have been made."""
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer of transformers, got <fun"):
        lctrain.generate(model, PROMPTS, tokenizer=lambda text: {"input_ids": [1]})


def test_arrays_are_seeds(model):
    expected = lctrain.generate(model, PROMPTS, max_new_tokens=3, seeds=[3, 5])
    for seeds in (np.array([3, 5]), torch.tensor([3, 5])):
        assert lctrain.generate(model, PROMPTS, max_new_tokens=3, seeds=seeds) == expected


def test_numbers_of_numpy_and_integers_are_options(model):
    expected = lctrain.generate(model, PROMPTS, max_new_tokens=3, top_k=5, repetition_penalty=2.0)
    for number in (2, np.float32(2), np.int64(2)):
        options = {"top_k": np.int64(5), "repetition_penalty": number}
        assert lctrain.generate(model, PROMPTS, max_new_tokens=3, **options) == expected


def test_models_that_cannot_generate():
    from transformers import T5Config, T5ForConditionalGeneration

    with pytest.raises(TypeError, match=r"must have transformers' generate\(\), got Linear"):
        lctrain.generate(nn.Linear(1, 1), PROMPTS)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(TypeError, match="must be a decoder, got the encoder-decoder T5For"):
        lctrain.generate(t5, PROMPTS)


def test_weights_without_values_are_refused(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to("meta"))
    match = r"must have weights with values, got lm_head.weight on device meta\. Load the weights"
    with pytest.raises(ValueError, match=match):
        lctrain.generate(model, PROMPTS)


def test_weights_that_fsdp1_hides_are_refused(model, monkeypatch):
    """The class is what FSDP1 wraps a module in; it needs a process group."""
    monkeypatch.setattr(model.lm_head, "__class__", FullyShardedDataParallel)
    match = (
        r"must be whole or sharded by FSDP2, got FullyShardedDataParallel \(FSDP1\), which hides"
    )
    with pytest.raises(ValueError, match=match):
        lctrain.generate(model, PROMPTS)


def test_a_module_without_its_model_says_how_to_build_it():
    module = LongContextModule({"model_type": "llama"})
    match = (
        r"must have been built, got a LongContextModule whose model is None\. Call its configure"
    )
    with pytest.raises(TypeError, match=match):
        lctrain.generate(module, PROMPTS)


def test_the_model_inside_of_distributed_data_parallel_generates(model):
    """The class is what wraps a model; its constructor needs a process group."""
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    expected = lctrain.generate(model, PROMPTS, max_new_tokens=2)
    assert lctrain.generate(wrapper, PROMPTS, max_new_tokens=2) == expected


def test_completions_fit_a_table_of_positions():
    """The last token is not read, so it needs no position."""
    model = gpt2(positions=8, eos_token_id=0)
    assert len(lctrain.generate(model, [[3] * 5], max_new_tokens=4, eos_token_id=[])) == 1
    with pytest.raises(ValueError, match=r"must be at most 8, .*GPT2LMHeadModel, got 9\. Shorten"):
        lctrain.generate(model, [[3], [3] * 5], max_new_tokens=5)


def test_an_end_token_of_the_config_may_be_beyond_the_vocabulary():
    """GPT2Config names token 50256, whatever the size of its vocabulary."""
    found = lctrain.generate(gpt2(), PROMPTS, max_new_tokens=2)
    assert [completion.finish for completion in found] == ["length", "length"]
