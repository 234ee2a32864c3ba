"""The clipped policy loss of GRPO and its relatives on packs, as a sum and a count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lctrain.instances import require_instance
from lctrain.loss.log_probs import TokenLogProbs

AVERAGES = ("token", "completion")
RATIOS = ("token", "sequence")


class PolicyLoss(NamedTuple):
    """Sum of a policy loss over a pack.

    Divide `loss` by the `divisor` of all micro-batches and ranks: return
    `{"loss": loss, "num_tokens": divisor}` from `training_step`, with the callback TokenExactLoss.

    Attributes:
        loss: 0-dim, weighted sum over the tokens.
        divisor: 0-dim int64, number of tokens, or with average="completion", of completions that
            have a token. Tokens of weight 0 are not counted.
        clipped: 0-dim, number of tokens that get no gradient because their ratio was clipped.
        kl: 0-dim, sum over the tokens of the estimated divergence D from the reference; 0 without a
            reference.
    """

    loss: Tensor
    divisor: Tensor
    clipped: Tensor
    kl: Tensor


def policy_loss(
    policy: TokenLogProbs,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    reference: Tensor | None = None,
    kl: float = 0.0,
    token_weights: Tensor | None = None,
    average: str = "token",
    ratio: str = "token",
) -> PolicyLoss:
    """Returns the clipped policy loss of completions, as GRPO uses it (arXiv 2402.03300).

    A token of completion i has the loss

        -min(r A_i, clip(r, 1 - clip_low, 1 + clip_high) A_i) + kl D

    with the advantage A_i, r = exp(log_prob - old_log_prob), and the divergence D =
    exp(reference - log_prob) - (reference - log_prob) - 1. The completions of a group may be in
    different packs, since no sum depends on the pack.

    Args:
        policy: Log-probabilities of n tokens of C completions.
        old_log_probs: [n], log-probabilities under the policy that sampled the completions, at the
            same temperature.
        advantages: [C], one for each completion, as `group_advantages` returns them; or [n].
        clip_low: How far the ratio may fall below 1; a positive number.
        clip_high: How far the ratio may rise above 1; None takes clip_low.
        reference: [n], log-probabilities of the reference model; None without a divergence.
        kl: Factor of the divergence from the reference, at least 0.
        token_weights: [n] constant factors of the tokens' losses, the divergence included, such as
            the ratios of a trainer to its sampler; None for 1. A token of weight 0 is left out of
            every sum, mean and count.
        average: "token" adds up the tokens' losses, and the divisor is their number (DAPO).
            "completion" adds up each completion's mean, and the divisor is the number of
            completions that have a token (GRPO).
        ratio: "token" for a ratio r of each token; "sequence" for one ratio per completion, exp of
            the mean of log_prob - old_log_prob over its tokens (GSPO, arXiv 2507.18071).

    Raises:
        ValueError: if a shape does not fit, or a number is out of range.
    """
    high = clip_low if clip_high is None else clip_high
    _check(policy, old_log_probs, advantages, reference, token_weights, average, ratio)
    _check_numbers(clip_low, high, kl, reference)
    if policy.completions and advantages.shape == (policy.completions,):
        advantages = advantages[policy.completion]
    advantages = advantages.detach().to(policy.log_probs)
    weights = torch.ones_like(policy.log_probs)
    if token_weights is not None:
        weights = token_weights.detach().to(weights)
    used = weights != 0
    counts = policy.sums(used.to(weights))
    logs = policy.log_probs - old_log_probs.detach().to(policy.log_probs)
    logs = logs.where(used, 0)
    if ratio == "sequence":
        logs = (policy.sums(logs) / counts.clamp(min=1))[policy.completion].where(used, 0)
    ratios = logs.exp()
    clipped = ratios.clamp(1 - clip_low, 1 + high)
    losses = -torch.minimum(ratios * advantages, clipped * advantages)
    without_gradient = used & (ratios != clipped) & (clipped * advantages < ratios * advantages)
    divergence = torch.zeros_like(losses)
    if reference is not None:
        difference = (reference.detach().to(losses) - policy.log_probs).where(used, 0)
        divergence = difference.exp() - difference - 1
        losses = losses + kl * divergence
    losses = losses * weights
    if average == "completion":
        losses = losses / counts.clamp(min=1)[policy.completion]
    divisor = (counts > 0).sum() if average == "completion" else used.sum()
    return PolicyLoss(losses.sum(), divisor, without_gradient.sum(), divergence.sum().detach())


def group_advantages(
    rewards: Tensor,
    members: Sequence[Sequence[int]] | Sequence[int] | int,
    *,
    scale: bool = True,
) -> Tensor:
    """Returns each completion's reward relative to the mean of its group, [C].

    Compute it before a group is divided over packs, micro-batches or ranks.

    Args:
        rewards: [C], one reward for each completion, group after group. Integers and booleans are
            converted to the default dtype.
        members: Number of completions in every group; or a list with the number of each group, or
            with the completions of each group, such as `batch.groups.members`.
        scale: Whether to divide by the standard deviation of the group, plus 1e-4.

    Raises:
        ValueError: if the rewards cannot be divided into the groups, or one is not finite.
    """
    require_instance("rewards", rewards, Tensor, "Pass one reward per completion.")
    if rewards.dim() != 1:
        raise ValueError(
            f"rewards must be of shape [C], one per completion, got {list(rewards.shape)}. Pass "
            "rewards.flatten(), group after group."
        )
    if isinstance(members, int):
        if members < 1 or len(rewards) % members:
            raise ValueError(
                f"members must divide the {len(rewards)} rewards into groups, got {members}. Pass "
                "the sizes of the groups."
            )
        sizes = [members] * (len(rewards) // members)
    else:
        sizes = [group if isinstance(group, int) else len(group) for group in members]
    if min(sizes, default=1) < 1:
        raise ValueError(
            f"members must give every group at least one completion, got {min(sizes)}. Leave empty "
            "groups out."
        )
    if sum(sizes) != len(rewards):
        raise ValueError(
            f"rewards must be one for each of {sum(sizes)} completions, got {len(rewards)}. Pass "
            "them group after group."
        )
    if not rewards.isfinite().all():
        raise ValueError(
            "rewards must be finite, got nan or inf, which would reach all weights. Give such a "
            "completion a reward of its own, such as 0."
        )
    if not rewards.is_floating_point():
        rewards = rewards.to(torch.get_default_dtype())
    found = []
    for group in rewards.split(sizes):
        advantage = group - group.mean()
        if scale:
            spread = group.std() if len(group) > 1 else group.new_zeros(())
            advantage = advantage / (spread + 1e-4)
        found.append(advantage)
    return torch.cat(found) if found else rewards.clone()


def _check(
    policy: TokenLogProbs,
    old_log_probs: Tensor,
    advantages: Tensor,
    reference: Tensor | None,
    token_weights: Tensor | None,
    average: str,
    ratio: str,
) -> None:
    require_instance("policy", policy, TokenLogProbs, "Call lctrain.loss.token_log_probs.")
    tokens = policy.log_probs.shape
    for name, tensor in (("old_log_probs", old_log_probs), ("advantages", advantages)):
        require_instance(name, tensor, Tensor, "Pass one number per token.")
    optional = {"reference": reference, "token_weights": token_weights}
    for name, value in {"old_log_probs": old_log_probs, **optional}.items():
        if value is not None and value.shape != tokens:
            raise ValueError(
                f"{name} must be of shape {list(tokens)}, one value per trained token, got "
                f"{list(value.shape)}. Order it as the tokens of the pack."
            )
    if advantages.shape not in ((policy.completions,), tokens):
        raise ValueError(
            f"advantages must be of shape [{policy.completions}], one per completion, or "
            f"{list(tokens)}, one per token, got {list(advantages.shape)}. Pass group_advantages."
        )
    for name, given, known in (("average", average, AVERAGES), ("ratio", ratio, RATIOS)):
        if given not in known:
            raise ValueError(
                f"{name} must be one of {', '.join(known)}, got {given!r}. Try {known[0]}."
            )


def _check_numbers(low: float, high: float, kl: float, reference: Tensor | None) -> None:
    if not 0 < low <= 1 or not high > 0:
        raise ValueError(
            f"clip_low must be in (0, 1] and clip_high above 0, got {low} and {high}. Try 0.2."
        )
    if not 0 <= kl < math.inf or (kl and reference is None):
        raise ValueError(
            f"kl must be at least 0 and finite, and 0 without a reference, got {kl}. Pass the "
            "reference's log-probabilities."
        )
