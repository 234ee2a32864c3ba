"""GRPO on passkeys: samples completions, rewards right words, and trains on the groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lctrain.batch import PackedBatch
from lctrain.config import TrainConfig
from lctrain.loss import group_advantages, policy_loss, token_log_probs
from lctrain.module import LongContextModule
from lctrain.recipes.post_training.experiment import Experiment
from lctrain.recipes.post_training.passkeys import Questions, rewards
from lctrain.recipes.post_training.reference import Reference
from lctrain.recipes.post_training.runs import train_seeds
from lctrain.recipes.post_training.sampling import sample
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
        assert config.attention is not None
        self.scale = scale
        self.reference = Reference(model, config.attention)
        self.mean_rewards: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Samples completions of every question, and returns the summed policy loss."""
        questions: Questions = batch
        samples = self.scale.samples
        words = questions.answers.shape[1]
        completions = sample(self.model, questions.prompts, samples, words)
        reward = rewards(completions, questions.answers)
        pack = PackedBatch.from_groups(
            [
                (prompt, completions[number * samples : (number + 1) * samples])
                for number, prompt in enumerate(questions.prompts)
            ]
        ).to(self.device)
        found = token_log_probs(self.model, pack)
        loss = policy_loss(
            found,
            found.log_probs.detach(),  # one step per sample: the sampling policy is this one
            group_advantages(reward, samples).to(self.device),
            reference=self.reference.log_probs(pack).log_probs,
            kl=self.scale.kl,
        )
        self._window.add(loss.loss, loss.divisor)
        self.mean_rewards.append(float(reward.mean()))
        return loss.loss


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
