"""complete_padded: completes prompts in left-padded batches, by transformers' generation loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lctrain.generation.forward import without_router_loss
from lctrain.generation.options import Completion
from lctrain.generation.sampler import Finish, Sampler
from lctrain.generation.task import GenerationTask


def complete_padded(model: Any, task: GenerationTask) -> list[Completion]:
    """Returns the completions of each prompt. A batch ends with its longest completion.

    Args:
        model: A causal LM of transformers, in eval mode.
        task: Prompts and options.
    """
    found: list[Completion] = []
    together = max(1, task.batch_size // task.samples)
    for first in range(0, len(task.prompts), together):
        found += _complete(model, task, range(len(task.prompts))[first : first + together])
    return found


def _complete(model: Any, task: GenerationTask, batch: range) -> list[Completion]:
    """Returns the completions of the prompts whose indices are in `batch`."""
    from transformers import LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

    device = next(model.parameters()).device
    rows = [task.prompts[index] for index in batch]
    longest = max(map(len, rows))
    pad = task.end[0] if task.end else 0
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    real = torch.arange(longest, device=device) >= torch.tensor(
        [[longest - len(row)] for row in rows], device=device
    )
    cache = _prompt_cache(model, ids, real, pad, task.samples)
    ids, real = (tensor.repeat_interleave(task.samples, 0) for tensor in (ids, real))
    numbers = range(batch.start * task.samples, batch.stop * task.samples)
    sampler = Sampler(task.options, real, [task.seeds[number] for number in numbers])
    stops = StopStringCriteria(task.tokenizer, list(task.stop)) if task.stop else None
    finish = Finish(longest, torch.tensor(task.end, dtype=torch.int64, device=device), stops)
    found = model.generate(
        input_ids=ids,
        attention_mask=real.long(),
        max_new_tokens=task.max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        logits_processor=LogitsProcessorList([sampler]),
        stopping_criteria=StoppingCriteriaList([finish]),
        **cache,
        **without_router_loss(model),
    )
    tokens = found[:, longest:].tolist()
    log_probs = torch.stack(sampler.log_probs, 1).tolist()
    assert finish.lengths is not None
    results = []
    for row, (number, length) in enumerate(zip(numbers, finish.lengths.tolist(), strict=True)):
        count = length or len(tokens[row])
        results.append(
            task.completion(number, tokens[row][:count], log_probs[row][:count], bool(length))
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
        **without_router_loss(model),
    )
    cache = found.past_key_values
    if not hasattr(cache, "batch_repeat_interleave"):
        return {}
    cache.batch_repeat_interleave(samples)
    return {"past_key_values": cache}
