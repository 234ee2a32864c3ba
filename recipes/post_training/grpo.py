"""GRPO on passkeys: samples completions, rewards right words, and trains on the groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lctrain.batch import PackedBatch
from lctrain.config import TrainConfig
from lctrain.distributed import Topology
from lctrain.distributed.sharding import through_root
from lctrain.generation import generate
from lctrain.loss import PolicyLoss, group_advantages, policy_loss, token_log_probs
from lctrain.module import LongContextModule
from lctrain.recipes.post_training.experiment import Experiment
from lctrain.recipes.post_training.passkeys import Questions, rewards
from lctrain.recipes.post_training.runs import reference_of, train_seeds
from lctrain.recipes.post_training.scale import Scale


class Grpo(LongContextModule):
    """Trains a policy on completions that it samples itself. A batch holds questions.

    Args:
        model: The policy, not patched.
        config: Settings of optimizer, attention, memory and seed.
        scale: Number of samples, and the factor of the divergence.

    Attributes:
        mean_rewards: Mean reward of every step.
    """

    def __init__(self, model: Any, config: TrainConfig, scale: Scale) -> None:
        super().__init__(model, config.optim, config.attention, config.seed, config.memory)
        self.scale = scale
        self.reference = reference_of(model, config)
        self.mean_rewards: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Samples completions of every question, and returns the summed policy loss."""
        questions: Questions = batch
        ranks = Topology.of(self._trainer)
        samples = self.scale.samples
        count = samples * len(questions.prompts)
        found = generate(
            self.model,
            list(questions.prompts),
            samples=samples,
            max_new_tokens=questions.answers.shape[1],
            seeds=first_seed(self.seed, batch_idx * ranks.size + ranks.rank, count),
            batch_size=count,
        )
        completions = [torch.tensor(completion.token_ids) for completion in found]
        old = torch.tensor([value for completion in found for value in completion.log_probs])
        reward = rewards(completions, questions.answers)
        pack = PackedBatch.from_groups(
            [
                (prompt, completions[number * samples : (number + 1) * samples])
                for number, prompt in enumerate(questions.prompts)
            ]
        ).to(self.device)
        advantages = group_advantages(reward, samples).to(self.device)
        loss = through_root(self._trainer, self._loss, pack, old.to(self.device), advantages)
        self._window.add(loss.loss, loss.divisor)
        self.mean_rewards.append(float(reward.mean()))
        return loss.loss

    def _loss(self, pack: PackedBatch, old: Tensor, advantages: Tensor) -> PolicyLoss:
        return policy_loss(
            token_log_probs(self.model, pack),
            old,
            advantages,
            reference=self.reference.log_probs(pack).log_probs,
            kl=self.scale.kl,
        )


def first_seed(run: int, step: int, count: int) -> int:
    """Returns the seed of a step's first sample; no other step of a run has the same seeds.

    Args:
        run: Seed of the run.
        step: Number of the step, counted over all ranks.
        count: Number of samples in a step.
    """
    return (run << 32) + step * count


def train_grpo(experiment: Experiment) -> None:
    """Trains with GRPO from every seed, and writes grpo.json."""

    def reward_of(module: Any) -> dict[str, Any]:
        return {"mean_reward_by_half": by_half(module.mean_rewards)}

    train_seeds(experiment, "grpo", Grpo, lambda questions, model: questions, reward_of)


def by_half(values: Sequence[float]) -> list[float]:
    """Returns the means of the first and the second half; both have the middle of an odd number.

    Args:
        values: One value per step, at least one.
    """
    half = -(-len(values) // 2)
    return [round(sum(part) / half, 4) for part in (values[:half], values[-half:])]
