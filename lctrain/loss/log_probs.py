"""Log-probabilities of the trained tokens of a pack, and sums of them for every completion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.batch_invariant import (
    is_batch_invariant,
    no_invariant_head,
    require_batch_invariant,
)
from lctrain.distributed.gather import run_in_forward
from lctrain.kernels import linear_cross_entropy
from lctrain.loss.causal_lm import probe
from lctrain.loss.output_head import OutputHead, find_output_head
from lctrain.loss.shared_prefixes import require_batch, require_flash_attention

CHUNK_LOGITS = 2**24
"""Logits that exist at a time while the entropy is computed."""


@dataclass(frozen=True, eq=False)
class TokenLogProbs:
    """Log-probabilities of the n trained tokens of a pack, in the order of the pack.

    The tokens belong to C completions: the suffixes of PackedBatch.from_groups, or the documents of
    a pack without groups.

    Attributes:
        log_probs: [n] float32 (float64 for a float64 model), log-probability of each token.
        completion: [n] int64, number of each token's completion, in rising order.
        completions: Number of completions C.
        entropy: [n], entropy in nats of the distribution of each token, without gradient; None if
            it was not asked for.
    """

    log_probs: Tensor
    completion: Tensor
    completions: int
    entropy: Tensor | None = None

    def sums(self, values: Tensor | None = None) -> Tensor:
        """Returns the sum over the tokens of every completion, [C]; 0 for one without a token.

        Args:
            values: [n], one value per token; None takes the log-probabilities.
        """
        values = self.log_probs if values is None else values
        return values.new_zeros(self.completions).index_add(0, self.completion, values)

    def counts(self) -> Tensor:
        """Returns the number of trained tokens of every completion, [C], in the dtype of sums."""
        return self.sums(torch.ones_like(self.log_probs))


def token_log_probs(
    model: nn.Module, batch: PackedBatch, *, temperature: float = 1.0, entropy: bool = False
) -> TokenLogProbs:
    """Returns the log-probabilities of a batch's trained tokens, from one pass of the model.

    No [T, V] logits exist, as in `causal_lm_loss`, and only the first call for a model synchronises
    with the device. A model with PEFT adapters is its own reference:
    `with torch.no_grad(), model.disable_adapter(): token_log_probs(model, batch)`.

    Args:
        model: A transformers causal LM, patched by `lctrain.patch_model` with attention="flash".
            If `fully_shard` divides it, all ranks call this function together.
        batch: A pack on the model's device.
        temperature: Divisor of the logits, above 0: the one with which the completions were
            sampled.
        entropy: Whether to compute entropies. This takes one more product with the output
            embedding.

    Raises:
        ValueError: if the temperature is not above 0 and finite, or differs from 1 for a model with
            a soft cap on its logits; if the batch is a share of a pack; if documents share a prefix
            and the attention of the model is not flash; if the weights of a sharded model cannot be
            gathered for the call.
    """
    require_batch(model, batch)
    if is_batch_invariant(model):
        require_batch_invariant(model)
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature must be above 0 and finite, got {temperature}. Use 1 to sample as is."
        )
    if batch.share is not None:
        raise ValueError(
            "batch must be a whole pack, whose completions are summed, got a share of one. Train "
            "with trainer.context_parallel=1, or call causal_lm_loss, which adds up tokens."
        )
    arguments = batch.model_kwargs()
    require_flash_attention(model, arguments)
    labels = batch.labels.flatten()
    trained = torch.nonzero_static(labels != IGNORE_INDEX, size=batch.num_valid_tokens).flatten()
    completion, completions = _completions(batch, trained)
    targets = labels[trained]

    def compute() -> tuple[Tensor, Tensor | None]:
        return _compute(model, arguments, trained, targets, temperature, entropy)

    log_probs, found = run_in_forward(model, compute)
    return TokenLogProbs(log_probs, completion, completions, found)


def _compute(
    model: nn.Module,
    arguments: dict[str, Any],
    trained: Tensor,
    targets: Tensor,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns the log-probability [n] of every target, and the entropy [n] or None.

    Args:
        model: The causal LM.
        arguments: Keyword arguments of its forward pass over T tokens.
        trained: Indices of the tokens that predict the targets, [n] int64.
        targets: Token ids [n] int64.
        temperature: Divisor of the logits.
        entropy: Whether to compute entropies.
    """
    head = find_output_head(model, partial(probe, targets.device, True))
    if head is None:
        if is_batch_invariant(model):
            raise no_invariant_head(model)
        logits = model(**arguments)["logits"].flatten(0, 1)[trained]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        log_probs = logits.log_softmax(-1)
        chosen = log_probs.gather(1, targets[:, None])[:, 0]
        found = -(log_probs.exp() * log_probs).sum(-1).detach() if entropy else None
        return chosen, found
    if head.softcap and temperature != 1:
        raise ValueError(
            f"temperature must be 1 for a model with a soft cap on its logits, got {temperature}. "
            "Sample its completions at temperature 1."
        )
    hidden = head.decoder(**arguments)[0].flatten(0, 1)[trained]
    loss, _ = linear_cross_entropy(
        hidden,
        head.projection.weight,
        targets,
        bias=head.projection.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale / temperature,
        batch_invariant=head.batch_invariant,
        reduction="none",
    )
    return -loss, _entropy(hidden, head, temperature) if entropy else None


def _completions(batch: PackedBatch, trained: Tensor) -> tuple[Tensor, int]:
    """Returns the completion of each trained token, [n] int64, and the number of completions."""
    ends = batch.cu_seqlens[1:].contiguous()
    document = torch.searchsorted(ends, trained.to(ends.dtype), right=True)
    if batch.groups is None:
        return document, len(batch.lengths)
    numbers = torch.full((len(batch.lengths),), -1, dtype=torch.int64)
    members = [document for group in batch.groups.members for document in group]
    numbers[members] = torch.arange(len(members))
    return numbers.to(trained.device, non_blocking=True)[document], len(members)


@torch.no_grad()
def _entropy(hidden: Tensor, head: OutputHead, temperature: float) -> Tensor:
    """Returns the entropy of the distribution at every hidden state, [n], a chunk at a time."""
    rows = max(1, CHUNK_LOGITS // head.projection.weight.shape[0])
    found = []
    for part in hidden.split(rows):
        logits = head.finish(nn.functional.linear(part, *_parameters(head)))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        log_probs = logits.log_softmax(-1)
        found.append(-(log_probs.exp() * log_probs).sum(-1))
    return torch.cat(found) if found else hidden.new_zeros(0)


def _parameters(head: OutputHead) -> tuple[Tensor, Tensor | None]:
    return head.projection.weight, head.projection.bias
