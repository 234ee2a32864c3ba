"""Trains the passkey model: first to copy words, then to find keys in longer and longer texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lctrain.data.passkey import KEY_WORDS, Filler, PasskeyFormat

LEARNING_RATE = 3e-3
LAST_RATE = 1e-4
WARMUP = 50  # steps of the learning-rate warmup
AVERAGED = 30  # steps over which the accuracy is averaged
IGNORED = -100
COPY_TOKENS = 32
SHORTEST_PERIOD = 6
MOST_KEY_WORDS = 8

Rows = tuple[Tensor, Tensor]  # token ids and labels, [rows, tokens] int64 each


@dataclass(frozen=True)
class Stage:
    """A stage of training, with rows of up to a certain length.

    Attributes:
        name: Name of what the rows hold, for the report.
        longest: Number of tokens of the longest row.
        rows: Number of rows in a step.
        steps: Largest number of steps.
        accuracy: Fraction of correctly predicted labels at which the stage ends early.
        copies: Whether every second step has rows of copied words; "only" for every step.
        decays: Whether the learning rate falls during the stage.
    """

    name: str
    longest: int
    rows: int
    steps: int
    accuracy: float = 1.0
    copies: bool | str = False
    decays: bool = False


def stages(shortest: int, window: int) -> tuple[Stage, ...]:
    """Returns the stages of training, in order.

    Args:
        shortest: Number of tokens of the shortest passkey document.
        window: Number of tokens of the longest passkey document.
    """
    return (
        Stage("copies", COPY_TOKENS, 64, 800, 0.95, copies="only"),
        Stage("keys in short texts", shortest + 12, 32, 800, 0.95, copies=True),
        Stage("keys in texts of half the window", window * 5 // 8, 32, 800, 0.97),
        Stage("keys in the window", window, 24, 500),
        Stage("the same, to the end", window, 24, 400, decays=True),
    )


class Material:
    """Generator of random training rows.

    Args:
        format: Passkey format of the tokenizer.
        documents: Token ids of the texts that keys are hidden in, [n] integers each.
        seed: Seed of the rows.
    """

    def __init__(self, format: PasskeyFormat, documents: Sequence[np.ndarray], seed: int) -> None:
        self.format = format
        self._filler = Filler.of(documents)
        self._words = torch.from_numpy(np.concatenate(format.words))
        self._random = np.random.default_rng(seed)
        self._generator = torch.Generator().manual_seed(seed)

    def copies(self, rows: int, tokens: int) -> Rows:
        """Returns rows of random words that repeat after a random number of words.

        Every word from the second repeat on has a label, which makes copying quick to learn.
        """
        shape = (rows, tokens)
        words = torch.randint(len(self._words), shape, generator=self._generator)
        half = tokens // 2 + 1
        period = torch.randint(SHORTEST_PERIOD, half, (rows, 1), generator=self._generator)
        place = torch.arange(tokens)[None]
        ids = self._words[words].gather(1, place % period)
        return ids, torch.where(place > period, ids, IGNORED)

    def keys(self, rows: int, longest: int) -> Rows:
        """Returns passkey documents of one random length; the words of the answer have labels."""
        tokens = int(self._random.integers(self.format.shortest, longest + 1))
        most = min(self.format.most_words(tokens), MOST_KEY_WORDS)
        ids = np.zeros((rows, tokens), dtype=np.int64)
        labels = np.full((rows, tokens), IGNORED)
        for row in range(rows):
            made = self.format.make(
                self._random,
                tokens,
                float(self._random.random()),
                self._filler,
                with_end=False,
                key_words=int(self._random.integers(KEY_WORDS, most + 1)),
            )
            answer = slice(made.answer_start, made.answer_start + made.answer_tokens)
            ids[row] = made.input_ids
            labels[row, answer] = made.input_ids[answer]
        return torch.from_numpy(ids), torch.from_numpy(labels)


def train_network(
    model: Any, material: Material, window: int, report: Callable[[str], None] = print
) -> int:
    """Trains a model through all stages.

    Args:
        model: A causal LM, which is trained in place.
        material: Generator of rows to train on.
        window: Number of tokens of the longest row.
        report: Function that gets one line of text per stage.

    Returns:
        Number of steps.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    model.train()
    step = 0
    for stage in stages(material.format.shortest, window):
        shares: list[float] = []
        for done in range(stage.steps):
            fall = (LAST_RATE - LEARNING_RATE) * done / stage.steps if stage.decays else 0.0
            for group in optimizer.param_groups:
                group["lr"] = (LEARNING_RATE + fall) * min(1.0, (step + 1) / WARMUP)
            copies = stage.copies == "only" or (stage.copies and done % 2 == 1)
            make = material.copies if copies else material.keys
            length = COPY_TOKENS if copies else stage.longest
            shares.append(_take_step(model, optimizer, *make(stage.rows, length)))
            step += 1
            if done + 1 >= AVERAGED and np.mean(shares[-AVERAGED:]) > stage.accuracy:
                break
        share = np.mean(shares[-AVERAGED:])
        report(f"{stage.name}: {len(shares)} steps, {share:.1%} of the words right")
    model.eval()
    return step


def _take_step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor) -> float:
    """Takes a step, and returns the share of the labels that the model predicted."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    logits = model.lm_head(hidden[chosen])
    optimizer.zero_grad()
    cross_entropy(logits, targets[chosen]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float((logits.argmax(-1) == targets[chosen]).float().mean())
