"""InvariantHead: logits of a batch-invariant model, and log-probabilities with the trainer's bits.

require_rollouts: refuses options of generate under which a batch-invariant model has others.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from lctrain.batch_invariant import (
    is_batch_invariant,
    no_invariant_head,
    require_batch_invariant,
)
from lctrain.loss.causal_lm import probe
from lctrain.loss.output_head import find_output_head

if TYPE_CHECKING:
    from lctrain_kernels.cross_entropy.log_probs import BatchInvariantHead


class InvariantHead(NamedTuple):
    """How a batch-invariant model computes logits, as `token_log_probs` does.

    Attributes:
        decoder: The model without its output embedding. It returns hidden states [1, T, E].
        head: Computes products with the output embedding, logits and log-probabilities.
    """

    decoder: nn.Module
    head: BatchInvariantHead


def find_invariant_head(model: Any, temperature: float) -> InvariantHead | None:
    """Returns the InvariantHead of a model; None for a model that is not batch-invariant.

    Args:
        model: A causal LM of transformers in eval mode, or a model of PEFT around one.
        temperature: Divisor of the logits, above 0.

    Raises:
        ValueError: if a linear layer of the model is not batch-invariant, or the logits are
            another function of the hidden states than `token_log_probs` computes.
    """
    if not is_batch_invariant(model):
        return None
    from lctrain_kernels.cross_entropy.log_probs import BatchInvariantHead

    require_batch_invariant(model)
    device = next(model.parameters()).device
    head = find_output_head(model, partial(probe, device, True))
    if head is None:
        raise no_invariant_head(model)
    products = BatchInvariantHead(
        head.projection.weight,
        head.projection.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        temperature=temperature,
    )
    return InvariantHead(head.decoder, products)


def require_rollouts(
    model: Any, batching: str, shared_prefixes: str, log_probs: str, refusal: str | None
) -> None:
    """Raises a ValueError if rollouts of a batch-invariant model would not be the trainer's.

    Args:
        model: A model that is batch-invariant, or not: then nothing is checked.
        batching: "auto", "continuous" or "padded".
        shared_prefixes: "auto", "always" or "never".
        log_probs: "decode" or "trainer".
        refusal: Why the model cannot generate over a paged cache; None if it can.
    """
    if not is_batch_invariant(model):
        return
    if batching == "padded" or refusal is not None:
        raise ValueError(
            "batching must be 'auto' or 'continuous' for a batch-invariant model, which cannot "
            f"generate in padded batches, got {batching!r}"
            + (f", and {refusal}" if refusal is not None else "")
            + ". Patch it without batch_invariant."
        )
    if shared_prefixes == "always":
        raise ValueError(
            "shared_prefixes must be 'auto' or 'never' for a batch-invariant model, got 'always': "
            "the sums would depend on the requests that share. Pass 'never'."
        )
    if log_probs == "trainer":
        raise ValueError(
            "log_probs must be 'decode' for a batch-invariant model, got 'trainer': they are the "
            "trainer's already, on packs of whole sequences. Pass log_probs='decode'."
        )


def logits_of(head: InvariantHead | None, scores: Tensor) -> Tensor:
    """Returns float32 logits [n, V] of what CachedForward has returned."""
    return scores.float() if head is None else head.head.logits(scores)
