"""The names of the evaluation tasks, and the settings that some of them have."""

from __future__ import annotations

from dataclasses import dataclass, field

TASKS = {
    "perplexity": "lctrain.eval.tasks.perplexity.Perplexity",
    "passkey": "lctrain.eval.tasks.passkey.PasskeyRetrieval",
}
"""Classes of lctrain's tasks by the name in `tasks`; a class has `of(config)`."""


@dataclass(frozen=True)
class PasskeyConfig:
    """Settings of `lctrain.eval.passkey_retrieval`.

    Attributes:
        lengths: Lengths of the texts in tokens; None for `lengths` of the evaluation.
        methods: Methods to compare; None for `methods` of the evaluation.
        depths: Depths of the key: fractions of the text before it, in [0, 1].
        keys_per_cell: Number of keys for each length and depth.
        seed: Seed of the keys and of the choice of text.
    """

    lengths: list[int] | None = None
    methods: list[str] | None = None
    depths: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    keys_per_cell: int = 20
    seed: int = 0
