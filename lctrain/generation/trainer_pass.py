"""completion_packs: completions as packs of groups. trainer_log_probs: the trainer's on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from lctrain.attention.spec import ATTENTION_NAMES
from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.generation.arguments import check_counts
from lctrain.generation.options import Completion
from lctrain.generation.token_choice import require_distributions
from lctrain.instances import require_instance, require_sequence
from lctrain.loss import token_log_probs

PACK_TOKENS = 32768
"""Most tokens of a pack of completions by default."""

_Group = tuple[list[int], list[list[int]]]


def completion_packs(
    completions: Sequence[Completion],
    samples: int = 1,
    max_tokens: int = PACK_TOKENS,
    *,
    share_prompts: bool = True,
) -> list[PackedBatch]:
    """Returns the completions of a call of `generate` as packs of groups, to train on.

    These are the packs on which `generate(log_probs="trainer")` computes log-probabilities. So
    `token_log_probs` of the same weights has the same bits on them.

    Args:
        completions: Completions, `samples` per prompt, prompt after prompt.
        samples: Completions of each prompt.
        max_tokens: Most tokens of a pack. The group of a prompt is not divided: one that is longer
            is a pack of its own.
        share_prompts: Whether a prompt is computed once for its samples. If not, every sequence is
            a document of its own, as a batch-invariant model needs it.

    Returns:
        Packs on the CPU, with the completions in their order; see PackedBatch.from_groups.

    Raises:
        TypeError: if the completions are no Completions.
        ValueError: if a count is no int of at least 1, or the completions are not `samples` per
            prompt.
    """
    check_counts(samples=samples, max_tokens=max_tokens)
    require_sequence("completions", completions, "Pass what generate returned.")
    for one in completions:
        require_instance("completions", one, Completion, "Pass what generate returned.")
    if len(completions) % samples:
        raise ValueError(
            f"completions must be samples={samples} per prompt, got {len(completions)}. Pass all "
            "completions of a call of generate, and its samples."
        )
    if not isinstance(share_prompts, bool):
        raise ValueError(f"share_prompts must be True or False, got {share_prompts!r}.")
    groups = [*_groups(completions, samples)]
    if share_prompts:
        return [PackedBatch.from_groups(pack) for pack in _divide(groups, max_tokens)]
    alone = [(prompt, [one]) for prompt, members in groups for one in members]
    return [_documents(pack) for pack in _divide(alone, max_tokens)]


def require_trainer_pass(model: Any, temperature: float) -> None:
    """Raises a ValueError unless `trainer_log_probs` works on a model, before tokens are generated.

    Args:
        model: A causal LM of transformers, in eval mode, or a model of PEFT around one.
        temperature: Divisor of the logits.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = getattr(base.config, "_attn_implementation", None)
    if attention != ATTENTION_NAMES["flash"]:
        raise ValueError(
            "log_probs must be 'decode' unless the model is patched with attention='flash', got "
            f"'trainer' and the attention {attention!r}. Pass log_probs='decode', or call "
            "token_log_probs on packs of your own."
        )
    device = next(model.parameters()).device
    token_log_probs(
        model, PackedBatch.from_groups([([0], [[0]])]).to(device), temperature=temperature
    )


def trainer_log_probs(
    model: Any,
    completions: Sequence[Completion],
    samples: int,
    temperature: float,
    max_tokens: int,
) -> list[Completion]:
    """Returns completions with the log-probabilities of a training forward in place of their own.

    Args:
        model: A model that require_trainer_pass accepts, in eval mode, without gradients.
        completions: Completions, `samples` per prompt.
        samples: Completions of each prompt.
        temperature: Divisor of the logits.
        max_tokens: Most tokens of a pack.

    Raises:
        ValueError: if the logits of a token give no distribution.
    """
    device = next(model.parameters()).device
    found = [
        token_log_probs(model, pack.to(device), temperature=temperature).log_probs
        for pack in completion_packs(completions, samples, max_tokens)
    ]
    values = iter(torch.cat(found).tolist())
    results = []
    for index, completion in enumerate(completions):
        log_probs = [next(values) for _ in completion.token_ids]
        require_distributions(log_probs, index // samples)
        results.append(replace(completion, log_probs=log_probs))
    return results


def _groups(completions: Sequence[Completion], samples: int) -> Iterator[_Group]:
    """Yields each prompt with its completions."""
    for first in range(0, len(completions), samples):
        group = completions[first : first + samples]
        if any(one.prompt_ids != group[0].prompt_ids for one in group):
            raise ValueError(
                f"completions must be samples={samples} per prompt, got different prompts in "
                f"completions {first} to {first + samples - 1}. Pass the samples of the call."
            )
        yield group[0].prompt_ids, [one.token_ids for one in group]


def _documents(groups: Sequence[_Group]) -> PackedBatch:
    """Returns groups of one completion as documents, whose completions are trained on."""
    documents = [[*prompt, *completion] for prompt, (completion,) in groups]
    labels = [[IGNORE_INDEX] * len(prompt) + completion for prompt, (completion,) in groups]
    return PackedBatch.from_documents(documents, labels=labels)


def _divide(groups: Sequence[_Group], most: int) -> Iterator[list[_Group]]:
    """Yields consecutive groups of at most `most` tokens together, at least one."""
    found: list[_Group] = []
    room = most
    for prompt, completions in groups:
        tokens = len(prompt) - 1 + sum(1 + len(completion) for completion in completions)
        if found and tokens > room:
            yield found
            found, room = [], most
        found.append((prompt, completions))
        room -= tokens
    if found:
        yield found
