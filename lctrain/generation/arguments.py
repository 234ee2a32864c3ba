"""Reads the arguments of generate, and raises errors before the model runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from lctrain.data.vocabulary import vocabulary_size
from lctrain.models.positions import require_positions

BATCHING = ("auto", "continuous", "padded")
SHARING = ("auto", "always", "never")
LOG_PROBS = ("decode", "trainer")
SEEDS = range(-(2**63), 2**64)  # what torch.Generator takes


def is_int(value: Any) -> bool:
    """Returns whether a value is an integer of Python or NumPy, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_counts(**counts: Any) -> None:
    """Raises ValueError unless every argument is an int of at least 1."""
    for name, value in counts.items():
        if not is_int(value) or value < 1:
            raise ValueError(
                f"{name} must be an int of at least 1, got {value!r}. Pass a positive number, or "
                "leave it out for the default."
            )


def check_batching(batching: Any, cache_gib: Any, cuda_graphs: Any, shared_prefixes: Any) -> None:
    """Raises ValueError unless the options of continuous batching are valid.

    Args:
        batching: One of BATCHING.
        cache_gib: None, or a finite number above 0.
        cuda_graphs: A bool.
        shared_prefixes: One of SHARING.
    """
    if batching not in BATCHING:
        raise ValueError(
            f"batching must be one of {', '.join(BATCHING)}, got {batching!r}. 'auto' chooses what "
            "the model allows."
        )
    if shared_prefixes not in SHARING:
        raise ValueError(
            f"shared_prefixes must be one of {', '.join(SHARING)}, got {shared_prefixes!r}. "
            "'never' makes requests read shared pages on their own."
        )
    number = isinstance(cache_gib, Real) and not isinstance(cache_gib, bool)
    if cache_gib is not None and not (number and 0 < cache_gib < math.inf):
        raise ValueError(
            f"cache_gib must be a finite number above 0, got {cache_gib!r}. None takes a share of "
            "the free memory."
        )
    if not isinstance(cuda_graphs, bool):
        raise ValueError(
            f"cuda_graphs must be True or False, got {cuda_graphs!r}. False runs steps as they are."
        )


def check_log_probs(log_probs: Any) -> None:
    """Raises ValueError unless an argument is one of LOG_PROBS."""
    if log_probs not in LOG_PROBS:
        raise ValueError(
            f"log_probs must be one of {', '.join(LOG_PROBS)}, got {log_probs!r}. 'trainer' takes "
            "one more forward pass, and gives the bits of token_log_probs."
        )


def read_prompts(prompts: Any, tokenizer: Any) -> list[list[int]]:
    """Returns the token ids of every prompt.

    Args:
        prompts: Token ids of each prompt, or texts.
        tokenizer: Tokenizer of transformers, or None.

    Raises:
        TypeError: if `tokenizer` cannot be called, or cannot decode.
        ValueError: if a prompt is empty, is neither ids nor text, or needs a tokenizer.
    """
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise TypeError(
            f"tokenizer must be a tokenizer of transformers, got {tokenizer!r}. Pass "
            "AutoTokenizer.from_pretrained(...)."
        )
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist()
    unordered = isinstance(prompts, set | frozenset)
    if isinstance(prompts, str | bytes | dict) or unordered or not hasattr(prompts, "__iter__"):
        raise ValueError(
            f"prompts must be a list of prompts, got {str(prompts)[:60]!r}. "
            f"{'Put them in an order.' if unordered else 'Write [prompt].'}"
        )
    return [_token_ids(prompt, tokenizer) for prompt in prompts]


def _token_ids(prompt: Any, tokenizer: Any) -> list[int]:
    """Returns the ids of a prompt; raises a ValueError if it is empty or needs a tokenizer."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("tokenizer must be given with prompts of text, got None. Pass one.")
        prompt = tokenizer(prompt)["input_ids"]
    ids = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    if not hasattr(ids, "__iter__") or isinstance(ids, bytes | dict):
        raise ValueError(
            "prompts must be a list of prompts, each a list of token ids or a text, got the "
            f"prompt {str(ids)[:60]}. Write [[1, 2, 3]] for one prompt of three tokens."
        )
    ids = list(ids)
    if not ids:
        raise ValueError(
            "prompts must be lists of at least one token id, got an empty one. Begin an empty "
            "prompt with the begin token."
        )
    if set(map(type, ids)) != {int} and not all(map(is_int, ids)):  # is_int takes 30 times as long
        raise ValueError(
            f"prompts must be lists of token ids, which are ints, got {str(ids)[:60]}. Pass the "
            "input_ids of each prompt, in one dimension."
        )
    return list(map(int, ids))


def check_fit(model: Any, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises ValueError if prompts do not fit the vocabulary or the table of learned positions.

    On a GPU, an index beyond an embedding table aborts the process.

    Args:
        model: A causal LM of transformers.
        rows: Token ids of each prompt.
        max_new_tokens: Most tokens of a completion; the last one is not read.
    """
    if not rows:
        return
    vocabulary = vocabulary_size(model)
    for token in (min(map(min, rows)), max(map(max, rows))):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"prompts must have token ids from 0 to {vocabulary - 1}, got {token}. Tokenize "
                "them with the model's own tokenizer."
            )
    require_positions(
        model,
        max(map(len, rows)) + max_new_tokens - 1,
        "prompts with their completions",
        "Shorten the prompts, or lower max_new_tokens.",
    )


def read_seeds(seeds: Any, count: int) -> list[int]:
    """Returns one seed per completion.

    Args:
        seeds: One seed, to which the index of the completion is added, or one of each completion.
        count: Number of completions.

    Raises:
        ValueError: if there are more or fewer seeds than completions, or one is no integer of 64
            bits.
    """
    seeds = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    found = range(seeds, seeds + count) if is_int(seeds) else seeds
    if isinstance(found, str) or not hasattr(found, "__len__"):
        raise ValueError(
            f"seeds must be an int, or a list with one per completion, got {seeds!r}. 0 numbers "
            "the completions from 0."
        )
    if len(found) != count:
        raise ValueError(
            f"seeds must have one number per completion ({count}), got {len(found)}. Pass one int "
            "to number the completions from."
        )
    for seed in found:
        if not is_int(seed) or int(seed) not in SEEDS:
            raise ValueError(f"seeds must be integers of 64 bits, got {seed!r}. Choose others.")
    return [int(seed) for seed in found]


def read_stops(stop: Any, tokenizer: Any) -> list[str]:
    """Returns the stop strings; raises a ValueError unless they are texts with a tokenizer."""
    found = None if isinstance(stop, str) or not hasattr(stop, "__iter__") else list(stop)
    if found is None or not all(isinstance(text, str) and text for text in found):
        raise ValueError(
            f"stop must be a list of texts of at least one character, got {stop!r}. Write "
            "stop=['...'], or [] for none."
        )
    if found and tokenizer is None:
        raise ValueError("tokenizer must be given with stop strings, got None. Pass the model's.")
    return found


def read_end_tokens(model: Any, given: Any) -> list[int]:
    """Returns the tokens that end a completion.

    Args:
        model: A causal LM of transformers.
        given: Token ids of the caller, one or several; None for those of the model that are in its
            vocabulary.

    Raises:
        ValueError: if a given one is not in the vocabulary.
    """
    vocabulary = range(vocabulary_size(model))
    tokens = given
    if tokens is None:
        tokens = model.generation_config.eos_token_id
    if tokens is None:
        tokens = getattr(model.config, "eos_token_id", None)
    if tokens is None:
        return []
    if isinstance(tokens, Tensor):
        tokens = tokens.tolist()
    found = [tokens] if _is_one(tokens) else list(tokens)
    wrong = [token for token in found if not is_int(token) or int(token) not in vocabulary]
    if wrong and given is not None:
        raise ValueError(
            f"eos_token_id must name token ids from 0 to {len(vocabulary) - 1}, got {wrong[0]!r}. "
            "Pass [] to complete up to max_new_tokens."
        )
    return [int(token) for token in found if token not in wrong]


def _is_one(tokens: Any) -> bool:
    """Returns whether end tokens are one value, valid or not, rather than several."""
    return isinstance(tokens, str) or not hasattr(tokens, "__iter__")


def find_causal_lm(model: Any) -> nn.Module:
    """Returns the causal LM of transformers that a model is, or that its attribute `model` is.

    Raises:
        TypeError: if there is none, or it is an encoder-decoder.
        ValueError: if its weights have no values here, or are divided by another way than FSDP2.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    causal_lm = model if hasattr(model, "generate") else getattr(model, "model", None)
    if causal_lm is None and hasattr(model, "configure_model"):
        raise TypeError(
            f"model must have been built, got a {type(model).__name__} whose model is None. Call "
            "its configure_model() first, or pass a causal language model."
        )
    if not hasattr(causal_lm, "generate"):
        raise TypeError(
            f"model must have transformers' generate(), got {type(model).__name__}. Pass the "
            "causal language model."
        )
    assert isinstance(causal_lm, nn.Module)
    if getattr(getattr(causal_lm, "config", None), "is_encoder_decoder", False):
        raise TypeError(
            f"model must be a decoder, got the encoder-decoder {type(causal_lm).__name__}. Call "
            "its own generate()."
        )
    _check_weights(causal_lm)
    return causal_lm


def _check_weights(model: nn.Module) -> None:
    """Raises ValueError unless the weights of a model can be read, or FSDP2 can gather them."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "model must be whole or sharded by FSDP2, got FullyShardedDataParallel (FSDP1), which "
            "hides the weights. Use trainer.strategy=fsdp2, or fully_shard."
        )
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return  # accelerate loads weights that are on device meta
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ValueError(
                f"model must have weights with values, got {name} on device meta. Load the weights "
                "first."
            )
