"""Passkey questions to train on and to measure with: a long text, and a question for its key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lctrain.attention import is_patched
from lctrain.data.passkey import Filler, PasskeyFormat
from lctrain.eval import Extension, passkey_retrieval
from lctrain.models.adapters import inside_adapters
from lctrain.recipes.post_training.scale import Scale


class Questions(NamedTuple):
    """Prompts of equal length, and their right answers.

    Attributes:
        prompts: [P, n] int64, texts with a hidden key, and the question at the end.
        answers: [P, w] int64, the words of the keys.
    """

    prompts: Tensor
    answers: Tensor


class QuestionSets(Dataset[Questions]):
    """One set of questions for every step of a run; the same ones in every run with the seed.

    Args:
        format: Passkey format of the tokenizer.
        documents: Token ids of the texts that keys are hidden in, [n] integers each.
        scale: Sizes: length of a text, and prompts in a set.
        seed: Seed of keys, depths and texts.
        steps: Number of sets.
    """

    def __init__(
        self,
        format: PasskeyFormat,
        documents: Sequence[np.ndarray],
        scale: Scale,
        seed: int,
        steps: int,
    ) -> None:
        self.format, self.scale, self.seed, self.steps = format, scale, seed, steps
        self._filler = Filler.of(documents, len(format.begin))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Questions:
        return self.questions(step, self.scale.prompts)

    def questions(self, step: int, number: int) -> Questions:
        """Returns the questions of a step.

        Args:
            step: Number of the step.
            number: Number of questions.
        """
        random = np.random.default_rng([self.seed, step])
        prompts, answers = [], []
        for _ in range(number):
            depth = float(random.random())
            made = self.format.make(random, self.scale.length, depth, self._filler, with_end=False)
            prompts.append(torch.from_numpy(made.input_ids[: made.answer_start]))
            answers.append(torch.from_numpy(made.input_ids[made.answer_start :]))
        return Questions(torch.stack(prompts), torch.stack(answers))


class AsItIs(Extension):
    """A method for the evaluation that leaves the model's attention unchanged at every length."""

    @contextmanager
    def patched(self, model: nn.Module) -> Iterator[None]:
        """Leaves the model unchanged; see Extension."""
        yield


def accuracy(
    model: Any, format: PasskeyFormat, held_out: Sequence[np.ndarray], scale: Scale
) -> float:
    """Returns the share of held-out passkeys that greedy decoding finds word for word.

    Args:
        model: A patched causal LM, or a PeftModel around one.
        format: Passkey format of the tokenizer.
        held_out: Token ids of held-out texts, [n] integers each.
        scale: Sizes: length of a text, depths and keys for each depth.
    """
    inner = inside_adapters(model)
    assert is_patched(inner)
    table = passkey_retrieval(
        inner,
        format,
        held_out,
        [scale.length],
        [AsItIs("plain", scale.length)],
        max_tokens=32 * scale.length,
        depths=scale.depths,
        keys_per_cell=scale.keys_per_depth,
    )
    return float(table.accuracy("plain").mean())


def rewards(completions: Sequence[Tensor], answers: Tensor) -> Tensor:
    """Returns each completion's share of words before its first error, [C] float32.

    Args:
        completions: C sequences of token ids, group after group.
        answers: [P, w] int64, right answers; C is a multiple of P.
    """
    wanted = answers.cpu().repeat_interleave(len(completions) // len(answers), 0)
    found = torch.zeros(len(completions))
    for index, (given, answer) in enumerate(zip(completions, wanted, strict=True)):
        given = given[: len(answer)].cpu()
        right = (given == answer[: len(given)]).long().cumprod(0).sum()
        found[index] = right / len(answer)
    return found
