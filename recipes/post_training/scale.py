"""Sizes of the recipe: one for a GPU or a few minutes on a CPU, and one that runs in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Sizes of the recipe.

    Attributes:
        length: Tokens of a passkey document, question and answer included.
        keys_per_depth: Number of held-out passkeys at each depth.
        depths: Depths at which held-out passkeys are hidden.
        prompts: Prompts in a step of GRPO, and in a pack of DPO.
        samples: Completions of each prompt in GRPO, and sampled to find wrong answers in DPO.
        pairs: Number of prompts from which the pairs of DPO are made.
        kl: Factor of the divergence from the reference model in GRPO.
        beta: Factor of the log-probabilities' difference in DPO.
        nll: Weight of the chosen answer's mean loss per token in DPO (arXiv 2404.19733).
        sft: Hydra overrides of the stage `sft`.
        dpo: Hydra overrides of the stage `dpo`.
        grpo: Hydra overrides of the stage `grpo`.
    """

    length: int
    keys_per_depth: int
    depths: tuple[float, ...]
    prompts: int
    samples: int
    pairs: int
    kl: float
    beta: float
    nll: float
    sft: tuple[str, ...] = ()
    dpo: tuple[str, ...] = ()
    grpo: tuple[str, ...] = ()


_FEW = ("data.max_bytes=100000", "trainer.max_steps=2", "data.num_workers=0")

SCALES = {
    "full": Scale(
        length=384,
        keys_per_depth=60,
        depths=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        prompts=8,
        samples=8,
        pairs=512,
        kl=0.001,
        beta=0.1,
        nll=1.0,
    ),
    "tiny": Scale(
        length=320,
        keys_per_depth=2,
        depths=(0.0, 1.0),
        prompts=4,
        samples=3,
        pairs=8,
        kl=0.01,
        beta=0.1,
        nll=1.0,
        sft=("trainer.max_steps=2", "data.num_workers=0"),
        dpo=_FEW,
        grpo=_FEW,
    ),
}
