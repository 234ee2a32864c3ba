"""generate: completes prompts with a model in the middle of its training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.generation.arguments import (
    check_batching,
    check_counts,
    check_fit,
    check_log_probs,
    find_causal_lm,
    read_end_tokens,
    read_prompts,
    read_seeds,
    read_stops,
)
from lctrain.generation.continuous import complete_continuously
from lctrain.generation.invariant_head import require_rollouts
from lctrain.generation.options import Completion, SamplingOptions
from lctrain.generation.padded import complete_padded
from lctrain.generation.pages import CacheShape
from lctrain.generation.road import find_cache
from lctrain.generation.task import GenerationTask
from lctrain.generation.trainer_pass import PACK_TOKENS, require_trainer_pass, trainer_log_probs
from lctrain.generation.whole_weights import WholeWeights
from lctrain.loss import evaluation_mode
from lctrain.models.kept_frequencies import kept_frequencies
from lctrain.warn import warn_caller


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
    batching: str = "auto",
    cache_gib: float | None = None,
    cuda_graphs: bool = True,
    shared_prefixes: str = "auto",
    log_probs: str = "decode",
    pack_tokens: int = PACK_TOKENS,
) -> list[Completion]:
    """Completes prompts by continuous batching over a paged cache, or else in padded batches.

    A patched model generates by continuous batching, with any attention: prompts are prefilled in
    packs without padding, all running requests decode one token per step on the decode kernels, and
    a request that ends makes room for the next. Equal prompts that run together are prefilled once
    and share pages, which are copied when one of them writes; prompts that begin alike share full
    pages. If the cache is full, the request that was admitted last is prefilled again later. On a
    GPU, decode steps are CUDA graphs.

    With dual chunk attention and scale="yarn", keys and values depend on the length of the request
    when they were stored. If a request may exceed the trained window, requests reserve the pages of
    their longest completions, so that none is prefilled again; above the window, only prompts of
    one length share pages.

    Other models generate in left-padded batches by transformers' loop: those without a patch, with
    RoPE frequencies that depend on the length unless the attention is dual chunk, with layers that
    share a cache or have keys and values of different widths, and compiled ones.

    All ranks of a model that FSDP2 shards call this function together. Each has prompts of its own,
    in any number, or none. The weights are gathered once per call, so each GPU needs the memory of
    the whole model; a step then communicates nothing. If one rank raises, all of them do.

    The model's training mode, torch's random state, the model's generation config and its rotary
    frequencies are as before when the call returns or raises. The cache is freed. Defaults of the
    model's generation config, such as a temperature, are not used. One thread at a time may use the
    model, since its mode is switched meanwhile.

    Args:
        model: A causal LM of transformers, a model of PEFT, or a module whose attribute `model` is
            one, such as a LongContextModule. Patched or not. A LightningModule that is attached to
            a trainer generates in the trainer's precision. DistributedDataParallel around one is
            ignored: ranks generate on their own.
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
        batch_size: Most completions that are made together; in padded batches, all samples of a
            prompt are, even if they are more.
        samples: Completions of each prompt. The cache of a prompt is computed once for samples that
            are made together.
        batching: "auto", "continuous" or "padded". "auto" chooses continuous batching if the model
            allows it.
        cache_gib: Most memory of the paged cache, in GiB; by default most of a GPU's free memory.
            The default on a CPU is 4 GiB, or what one request needs if that is more. The cache is
            never larger than a full batch needs.
        cuda_graphs: Whether decode steps on a GPU are captured. A model with hooks of others, or
            with weights on several devices, decodes without graphs and warns.
        shared_prefixes: Whether a decode step reads pages that requests share once for all of them:
            "auto" on a GPU, where it takes less time; "always"; or "never". Attention is the same
            up to rounding, which then depends on the group. With "never", the bits of a request's
            attention do not depend on other requests.
        log_probs: Which log-probabilities the completions have. "decode": those from which the
            tokens were drawn. "trainer": those that `token_log_probs` computes, bit for bit, on the
            packs of `completion_packs(completions, samples, pack_tokens)`, in eval mode; the two
            differ by rounding. This takes one more forward pass, and attention="flash".
        pack_tokens: Most tokens of a pack with log_probs="trainer".

    Returns:
        `samples` Completions per prompt, prompt after prompt, in the order of the prompts.

    Raises:
        TypeError: if the model cannot generate, or `tokenizer` is no tokenizer.
        ValueError: if an argument does not fit, a token is outside the vocabulary, a prompt with
            its completion is longer than the model's table of learned positions or does not fit the
            cache, the model cannot do what `batching` says, the logits of a token of a completion
            give no distribution, such as NaN, or the weights of a sharded model do not fit a GPU.
    """
    causal_lm = find_causal_lm(model)
    weights = WholeWeights(causal_lm, model)
    with weights.checked():
        options = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty)
        counts = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "samples": samples}
        check_counts(**counts, pack_tokens=pack_tokens)
        check_log_probs(log_probs)
        check_batching(batching, cache_gib, cuda_graphs, shared_prefixes)
        stops = read_stops(stop, tokenizer)
        rows = read_prompts(prompts, tokenizer)
        numbers = read_seeds(seeds, len(rows) * samples)
        end = read_end_tokens(causal_lm, eos_token_id)
        check_fit(causal_lm, rows, max_new_tokens)
    task = GenerationTask(
        rows,
        numbers,
        options,
        int(max_new_tokens),
        end,
        stops,
        tokenizer,
        int(batch_size),
        int(samples),
    )
    with weights.gathered():
        if not rows:
            return []
        with _as_before(causal_lm), _precision_of(model):
            divisor = float(temperature or 1)
            shape = "batching is 'padded'" if batching == "padded" else find_cache(causal_lm)
            refusal = shape if isinstance(shape, str) and batching != "padded" else None
            require_rollouts(causal_lm, batching, shared_prefixes, log_probs, refusal)
            if log_probs == "trainer":
                require_trainer_pass(causal_lm, divisor)
            found = _complete(
                causal_lm, task, shape, batching, cache_gib, cuda_graphs, shared_prefixes
            )
            if log_probs == "decode":
                return found
            return trainer_log_probs(causal_lm, found, task.samples, divisor, int(pack_tokens))


def _complete(
    causal_lm: Any,
    task: GenerationTask,
    shape: CacheShape | str,
    batching: str,
    cache_gib: float | None,
    cuda_graphs: bool,
    shared_prefixes: str,
) -> list[Completion]:
    """Completes the prompts of a task on one of the two ways.

    `shape` is the shape of the paged cache, or why there is none; see generate for the others.
    """
    if not isinstance(shape, str):
        return complete_continuously(
            causal_lm, task, shape, cache_gib, cuda_graphs, shared_prefixes
        )
    if batching == "continuous":
        raise ValueError(
            f"batching must be 'padded' or 'auto' for {type(causal_lm).__name__}, got "
            f"'continuous': {shape}. Patch the model, or change it."
        )
    if cache_gib is not None:
        warn_caller(f"cache_gib is not used: {shape}. Lower batch_size to save memory.")
    if shared_prefixes == "always":
        warn_caller(f"shared_prefixes is not used: {shape}. Padded batches share no pages.")
    return complete_padded(causal_lm, task)


def _precision_of(model: Any) -> Any:
    """Returns the context in which the trainer of a LightningModule runs forward passes."""
    trainer = getattr(model, "_trainer", None)
    return nullcontext() if trainer is None else trainer.precision_plugin.forward_context()


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
