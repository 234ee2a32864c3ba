"""DPO on passkeys: pairs of the right key and a wrong answer, which share their long prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lctrain.batch import PackedBatch
from lctrain.config import TrainConfig
from lctrain.distributed.sharding import through_root
from lctrain.generation import generate
from lctrain.loss import preference_loss, token_log_probs
from lctrain.module import LongContextModule
from lctrain.recipes.post_training.experiment import Experiment
from lctrain.recipes.post_training.passkeys import QuestionSets
from lctrain.recipes.post_training.runs import reference_of, train_seeds
from lctrain.recipes.post_training.scale import Scale


class Dpo(LongContextModule):
    """Trains a policy on packs of preference pairs.

    Args:
        model: The policy, not patched.
        config: Settings of optimizer, attention, memory and seed.
        scale: The factors beta and nll.

    Attributes:
        ranked: Share of pairs that the policy ranks correctly, of every step.
    """

    def __init__(self, model: Any, config: TrainConfig, scale: Scale) -> None:
        super().__init__(model, config.optim, config.attention, config.seed, config.memory)
        self.scale = scale
        self.reference = reference_of(model, config)
        self.ranked: list[float] = []

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Returns the summed loss of the pairs in a pack."""
        loss, pairs, ranked = through_root(self._trainer, self._loss, batch)
        self._window.add(loss, pairs)
        self.ranked.append(float(ranked))
        return loss

    def _loss(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the summed loss, the number of pairs, and the share ranked correctly."""
        reference = self.reference.log_probs(batch).sums()
        found = token_log_probs(self.model, batch)
        pairs = preference_loss(found, reference, beta=self.scale.beta)
        chosen, rejected = found.sums().view(-1, 2).unbind(1)
        # Without this term, DPO also lowers the probability of the chosen answers.
        likelihood = (chosen / found.counts().view(-1, 2)[:, 0]).sum()
        loss = pairs.loss - self.scale.nll * likelihood
        return loss, pairs.pairs, (chosen > rejected).float().mean()


def make_pairs(questions: QuestionSets, model: Any) -> list[PackedBatch]:
    """Returns packs of pairs: the right key, and a wrong answer that the model samples.

    Questions whose samples are all right make no pair.

    Args:
        questions: Questions to make pairs of.
        model: The model before training, patched.
    """
    scale = questions.scale
    pairs: list[tuple[Tensor, list[Tensor]]] = []
    for step in range(-(-scale.pairs // scale.prompts)):
        prompts, answers = questions.questions(step, scale.prompts)
        sampled = generate(
            model,
            list(prompts),
            samples=scale.samples,
            max_new_tokens=answers.shape[1],
            seeds=step * scale.prompts * scale.samples,
            batch_size=scale.prompts * scale.samples,
        )
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            own = sampled[number * scale.samples : (number + 1) * scale.samples]
            wrong = [row.token_ids for row in own if row.token_ids != answer.tolist()]
            if wrong:
                pairs.append((prompt, [answer, torch.tensor(wrong[0])]))
    if not pairs:
        raise ValueError(
            f"length must be one at which the model errs, got {scale.length}, at which all "
            "samples are right. Raise it."
        )
    return [
        PackedBatch.from_groups(pairs[start : start + scale.prompts])
        for start in range(0, len(pairs), scale.prompts)
    ]


def train_dpo(experiment: Experiment) -> None:
    """Trains with DPO from every seed, and writes dpo.json."""

    def ranking_of(module: Any) -> dict[str, Any]:
        return {"pairs_ranked_correctly": [_mean(module.ranked[:10]), _mean(module.ranked[-10:])]}

    train_seeds(experiment, "dpo", Dpo, make_pairs, ranking_of)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)
