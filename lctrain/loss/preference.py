"""Losses on pairs of a chosen and a rejected completion, as a sum and a count."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lctrain.instances import require_instance
from lctrain.loss.log_probs import TokenLogProbs

KINDS = ("dpo", "ipo", "simpo", "orpo")


class PreferenceLoss(NamedTuple):
    """Sum of a preference loss over the pairs of a pack.

    Divide `loss` by the `pairs` of all micro-batches and ranks: return
    `{"loss": loss, "num_tokens": pairs}` from `training_step`, with the callback TokenExactLoss.

    Attributes:
        loss: 0-dim, sum over the pairs.
        pairs: 0-dim int64, number of pairs in which both completions have a trained token. Other
            pairs add nothing to the loss.
        margins: [completions / 2], reward of the chosen completion minus that of the rejected one,
            without gradient. A positive margin ranks the pair correctly. It is 0 for a pair that is
            not counted.
    """

    loss: Tensor
    pairs: Tensor
    margins: Tensor


def preference_loss(
    policy: TokenLogProbs,
    reference: Tensor | None = None,
    *,
    kind: str = "dpo",
    beta: float = 0.1,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Returns the loss of pairs of completions, of which the first is the chosen one.

    For a completion, S is the sum of its tokens' log-probabilities, R the same sum of the reference
    model, and n its number of tokens. "Difference" is the value of the chosen completion minus that
    of the rejected one.

    - "dpo" (arXiv 2305.18290): -log sigmoid(beta m), with m the difference of S - R. With
      label_smoothing e it is conservative DPO: -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta
      m).
    - "ipo" (arXiv 2310.12036): (d - 1 / (2 beta))^2, with d the difference of (S - R) / n.
    - "simpo" (arXiv 2405.14734), without a reference: -log sigmoid(beta a - gamma), with a the
      difference of S / n.
    - "orpo" (arXiv 2403.07691), without a reference: -S / n of the chosen completion, minus beta
      log sigmoid(o), with o the difference of log(p / (1 - p)) for p = exp(S / n).

    Args:
        policy: Log-probabilities of a pack whose completions 2i and 2i + 1 are pair i, as
            `PackedBatch.from_groups([(prompt, [chosen, rejected]), ...])` gives them.
        reference: [completions], summed log-probabilities of the reference: `TokenLogProbs.sums()`
            of the reference on the same pack, without gradient. None for simpo and orpo.
        kind: Loss, one of KINDS.
        beta: Factor of the log-probabilities' difference, above 0; for orpo, of the odds ratio.
        gamma: Target margin of simpo.
        label_smoothing: Probability in [0, 0.5) that a pair is labelled the wrong way, for dpo.

    Raises:
        ValueError: if the completions are no pairs, or an argument does not fit the kind.
    """
    _check(policy, reference, kind, beta, gamma, label_smoothing)
    sums, counts = policy.sums().view(-1, 2), policy.counts().view(-1, 2)
    means = sums / counts.clamp(min=1)
    used = (counts > 0).all(1)
    if kind == "orpo":
        odds = means - _log1mexp(means)
        margin = beta * (odds[:, 0] - odds[:, 1])
        losses = -means[:, 0] - beta * logsigmoid(odds[:, 0] - odds[:, 1])
    elif kind == "simpo":
        margin = beta * (means[:, 0] - means[:, 1])
        losses = -logsigmoid(margin - gamma)
    else:
        assert reference is not None
        ratios = sums - reference.detach().to(sums).view(-1, 2)
        if kind == "ipo":
            ratios = ratios / counts.clamp(min=1)
        difference = ratios[:, 0] - ratios[:, 1]
        margin = beta * difference
        if kind == "ipo":
            losses = (difference - 1 / (2 * beta)).square()
        else:
            losses = -(1 - label_smoothing) * logsigmoid(margin)
            if label_smoothing:
                losses = losses - label_smoothing * logsigmoid(-margin)
    losses, margin = losses.where(used, 0), margin.detach().where(used, 0)
    return PreferenceLoss(losses.sum(), used.sum(), margin)


def _log1mexp(values: Tensor) -> Tensor:
    """Returns log(1 - exp(values)) for values below 0, accurate near 0 and far from it."""
    border = -math.log(2)
    # Each branch is finite, so that the gradient of the other one is not nan.
    near = values.clamp(border, -torch.finfo(values.dtype).tiny)
    far = values.clamp(max=border)
    return torch.where(values > border, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def _check(
    policy: TokenLogProbs,
    reference: Tensor | None,
    kind: str,
    beta: float,
    gamma: float,
    label_smoothing: float,
) -> None:
    require_instance("policy", policy, TokenLogProbs, "Call lctrain.loss.token_log_probs.")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}. Try dpo.")
    if policy.completions % 2:
        raise ValueError(
            f"policy must hold pairs of completions, got {policy.completions} completions. Build "
            "the pack with PackedBatch.from_groups([(prompt, [chosen, rejected]), ...])."
        )
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be above 0 and finite, got {beta}. Try 0.1.")
    needs = kind in ("dpo", "ipo")
    if needs and reference is None:
        raise ValueError(
            f"reference must be given for {kind}, got None. Pass the sums of the reference model, "
            "or use simpo or orpo."
        )
    if not needs and reference is not None:
        raise ValueError(f"reference must be None for {kind}, got a tensor. Leave it out.")
    if reference is not None and reference.shape != (policy.completions,):
        raise ValueError(
            f"reference must be of shape [{policy.completions}], one sum per completion, got "
            f"{list(reference.shape)}. Pass token_log_probs(...).sums() of the same pack."
        )
    if gamma and kind != "simpo":
        raise ValueError(f"gamma must be 0 for {kind}, got {gamma}. It is the margin of simpo.")
    if not math.isfinite(gamma):
        raise ValueError(f"gamma must be finite, got {gamma}. Try 0.5.")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and kind != "dpo"):
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), and 0 for other kinds than dpo, got "
            f"{label_smoothing} for {kind}. Leave it out."
        )
