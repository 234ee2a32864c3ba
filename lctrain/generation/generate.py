"""generate: completes prompts with a model in the middle of its training."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.generation.arguments import (
    check_counts,
    check_fit,
    find_causal_lm,
    read_end_tokens,
    read_prompts,
    read_seeds,
    read_stops,
)
from lctrain.generation.options import Completion, SamplingOptions
from lctrain.generation.sampler import Finish, Sampler, require_distributions
from lctrain.loss import evaluation_mode
from lctrain.models.kept_frequencies import kept_frequencies


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int] | Tensor | str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seeds: int | Sequence[int] = 0,
    stop: Sequence[str] = (),
    eos_token_id: int | Sequence[int] | None = None,
    tokenizer: Any = None,
    batch_size: int = 64,
    samples: int = 1,
) -> list[Completion]:
    """Completes prompts, in batches of left-padded rows, by transformers' generation loop.

    The model's training mode, torch's random state, the model's generation config and its rotary
    frequencies are as before when the call returns or raises. The cache is freed. Defaults of the
    model's generation config, such as a temperature, are not used.

    Args:
        model: A causal LM of transformers, a model of PEFT, or a module whose attribute `model` is
            one, such as a LongContextModule. Patched or not.
        prompts: Token ids of each prompt, or texts, if there is a tokenizer.
        max_new_tokens: Most tokens of a completion.
        temperature: Divisor of the logits; 0 chooses the most probable token.
        top_k: Number of most probable tokens that may be drawn; 0 for all.
        top_p: The fewest most probable tokens whose probabilities sum to this may be drawn.
        min_p: Tokens with less than this share of the highest probability are not drawn.
        repetition_penalty: Divisor of positive logits of tokens that have occurred; 1 for none.
        seeds: Seed of each completion, or one number, to which the index of the completion is
            added. A completion draws the same noise in every batch.
        stop: Strings that end a completion; they are part of it. A string that begins in the prompt
            does not count. They need a tokenizer.
        eos_token_id: Tokens that end a completion; by default those of the model.
        tokenizer: Tokenizer of transformers, for prompts of text and for the completions' text.
        batch_size: Completions that are made together; all samples of a prompt are, even if they
            are more.
        samples: Completions of each prompt. The cache of a prompt is computed once.

    Returns:
        `samples` Completions per prompt, prompt after prompt, in the order of the prompts.

    Raises:
        TypeError: if the model cannot generate, or `tokenizer` is no tokenizer.
        ValueError: if an argument does not fit, a token is outside the vocabulary, a prompt with
            its completion is longer than the model's table of learned positions, or the logits of
            a token of a completion give no distribution, such as NaN.
    """
    causal_lm = find_causal_lm(model)
    options = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty)
    check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size, samples=samples)
    stops = read_stops(stop, tokenizer)
    rows = read_prompts(prompts, tokenizer)
    numbers = read_seeds(seeds, len(rows) * samples)
    end = read_end_tokens(causal_lm, eos_token_id)
    check_fit(causal_lm, rows, max_new_tokens)
    completions: list[Completion] = []
    together = max(1, batch_size // samples)
    with _as_before(causal_lm):
        for first in range(0, len(rows), together):
            batch = slice(first, first + together)
            completions += _complete(
                causal_lm,
                rows[batch],
                numbers[batch.start * samples : batch.stop * samples],
                options,
                max_new_tokens,
                end,
                stops,
                tokenizer,
                first,
            )
    return completions


def _complete(
    model: Any,
    rows: Sequence[list[int]],
    seeds: Sequence[int],
    options: SamplingOptions,
    max_new_tokens: int,
    end: Sequence[int],
    stop: Sequence[str],
    tokenizer: Any,
    first: int,
) -> list[Completion]:
    """Returns as many completions of each prompt of a batch as it has seeds.

    Prompt `first` is the first one.
    """
    from transformers import LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

    samples = len(seeds) // len(rows)
    device = next(model.parameters()).device
    longest = max(map(len, rows))
    pad = end[0] if end else 0
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    real = torch.arange(longest, device=device) >= torch.tensor(
        [[longest - len(row)] for row in rows], device=device
    )
    cache = _prompt_cache(model, ids, real, pad, samples)
    ids, real = (tensor.repeat_interleave(samples, 0) for tensor in (ids, real))
    rows = [row for row in rows for _ in range(samples)]
    sampler = Sampler(options, real, seeds)
    stops = StopStringCriteria(tokenizer, list(stop)) if stop else None
    finish = Finish(longest, torch.tensor(end, dtype=torch.int64, device=device), stops)
    found = model.generate(
        input_ids=ids,
        attention_mask=real.long(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        logits_processor=LogitsProcessorList([sampler]),
        stopping_criteria=StoppingCriteriaList([finish]),
        **cache,
    )
    tokens = found[:, longest:].tolist()
    log_probs = torch.stack(sampler.log_probs, 1).tolist()
    assert finish.lengths is not None
    results = []
    for index, (row, length) in enumerate(zip(rows, finish.lengths.tolist(), strict=True)):
        count = length or len(tokens[index])
        made = tokens[index][:count]
        require_distributions(log_probs[index][:count], first + index // samples)
        results.append(
            Completion(
                prompt_ids=row,
                token_ids=made,
                log_probs=log_probs[index][:count],
                finish="stop" if length else "length",
                text=None if tokenizer is None else tokenizer.decode(made),
            )
        )
    return results


def _prompt_cache(model: Any, ids: Tensor, real: Tensor, pad: int, samples: int) -> dict[str, Any]:
    """Returns the argument of generate() with the cache of prompts, repeated for their samples.

    The cache holds all tokens of the prompts but the last one. It is left out for one sample, for a
    prompt of one token, and for a cache that cannot be repeated.

    Args:
        model: The causal LM.
        ids: [P, n] int64, left-padded prompts.
        real: [P, n] bool, True at tokens that are not padding.
        pad: Token id of the padding.
        samples: Number of completions of each prompt.
    """
    if samples == 1 or not bool(real[:, -2:].all()) or ids.shape[1] == 1:
        return {}
    found = model.generate(
        input_ids=ids[:, :-1],
        attention_mask=real[:, :-1].long(),
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=pad,
        return_dict_in_generate=True,
    )
    cache = found.past_key_values
    if not hasattr(cache, "batch_repeat_interleave"):
        return {}
    cache.batch_repeat_interleave(samples)
    return {"past_key_values": cache}


@contextmanager
def _as_before(model: Any) -> Iterator[None]:
    """Puts a model into eval mode, and restores what a generation changes."""
    from transformers import GenerationConfig

    owner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = owner.generation_config
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    try:
        owner.generation_config = GenerationConfig()
        generators = torch.random.fork_rng([device] if on_gpu else [])
        with evaluation_mode(model), kept_frequencies(model), generators:
            yield
    finally:
        owner.generation_config = config
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
