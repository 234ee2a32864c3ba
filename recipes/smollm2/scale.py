"""Sizes of the recipe: for a GPU, for a CPU, and one that runs the same code in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Sizes of the recipe.

    Attributes:
        window: Length of the texts that the model was trained on, in tokens.
        within: Context lengths up to the window, for the gain from context.
        beyond: Context lengths from the window on, for the methods.
        stride: Number of positions that each window of an evaluation scores.
        strides: Number of windows in each novel; the first one begins with the novel.
        documents: Number of novels, the longest first.
        answers: Context lengths up to the window, for needles and RULER.
        answers_beyond: Context lengths beyond the window, for needles.
        answer_tokens: Tokens of the prompts, answers included, that are answered together.
        depths: Fractions of the text before a needle.
        needles: Number of needles at each length and depth.
        ruler_tasks: Names of RULER's tasks; None for all but qa.
        ruler_items: Number of prompts of each of RULER's tasks at each length.
        long: Number of tokens of a document in the continued training.
        held_out_strides: Number of windows in the held-out novel after the continued training.
        training: Hydra overrides of the continued training.
    """

    window: int
    within: tuple[int, ...]
    beyond: tuple[int, ...]
    stride: int
    strides: int
    documents: int
    answers: tuple[int, ...]
    answers_beyond: tuple[int, ...]
    answer_tokens: int
    depths: tuple[float, ...]
    needles: int
    ruler_tasks: tuple[str, ...] | None
    ruler_items: int
    long: int
    held_out_strides: int
    training: tuple[str, ...]


_LENGTHS = (1024, 2048, 4096, 8192)

SCALES = {
    "full": Scale(
        window=8192,
        within=_LENGTHS,
        beyond=(8192, 16384, 32768),
        stride=1024,
        strides=4,
        documents=6,
        answers=(4096, 8192),
        answers_beyond=(16384, 32768),
        answer_tokens=262144,
        depths=(0.0, 0.25, 0.5, 0.75, 1.0),
        needles=4,
        ruler_tasks=None,
        ruler_items=10,
        long=32768,
        held_out_strides=32,
        training=(
            "data.max_tokens=32768",
            "trainer.max_steps=300",
            "trainer.limit_val_batches=2",
            "trainer.log_every_n_steps=5",
        ),
    ),
    "cpu": Scale(
        window=8192,
        within=_LENGTHS,
        beyond=(8192, 16384),
        stride=1024,
        strides=1,
        documents=2,
        answers=(4096,),
        answers_beyond=(16384,),
        answer_tokens=16384,
        depths=(0.0, 0.5, 1.0),
        needles=1,
        ruler_tasks=("niah_single_1", "vt"),
        ruler_items=2,
        long=16384,
        held_out_strides=1,
        training=(
            "data.max_tokens=16384",
            "trainer.max_steps=4",
            "trainer.limit_val_batches=1",
            "trainer.log_every_n_steps=1",
        ),
    ),
    "tiny": Scale(
        window=1024,
        within=(256, 512, 1024),
        beyond=(1024, 2048),
        stride=128,
        strides=1,
        documents=1,
        answers=(1024,),
        answers_beyond=(2048,),
        answer_tokens=2048,
        depths=(0.5,),
        needles=1,
        ruler_tasks=("niah_single_1",),
        ruler_items=1,
        long=2048,
        held_out_strides=1,
        training=(
            "data.max_tokens=2048",
            "data.num_workers=0",
            "trainer.max_steps=2",
            "trainer.limit_val_batches=1",
            "trainer.log_every_n_steps=1",
            "trainer.enable_progress_bar=false",
        ),
    ),
}
