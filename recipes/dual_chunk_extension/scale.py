"""Sizes of the experiment: one for a GPU, and one that runs the same code in minutes on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

RATIOS = (1, 2, 4, 8, 16)
TRAIN_RATIO = 8  # length of texts in the continued training, in trained windows


@dataclass(frozen=True)
class Scale:
    """Sizes of the experiment.

    Attributes:
        window: Number of tokens of the longest document in the first training.
        documents: Number of held-out documents for perplexity, the longest first.
        keys_per_cell: Number of passkeys per length and depth.
        depths: Positions of the key, as fractions of the filler text.
        max_tokens: Tokens in a forward pass of the evaluations.
        continued: Hydra overrides of the continued training.
        train: Hydra overrides of the experiment `dual_chunk_extension`.
    """

    window: int
    documents: int
    keys_per_cell: int
    depths: tuple[float, ...]
    max_tokens: int
    continued: tuple[str, ...]
    train: tuple[str, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Context lengths in tokens: 1 to 16 times the window."""
        return [ratio * self.window for ratio in RATIOS]

    @property
    def stride(self) -> int:
        """Number of positions that each window scores, for perplexity."""
        return self.window // 2

    @property
    def document_tokens(self) -> int:
        """Tokens used of each document for perplexity: the longest length, 4 strides and 1."""
        return self.lengths[-1] + 4 * self.stride + 1


SCALES = {
    "full": Scale(
        window=1024,
        documents=40,
        keys_per_cell=20,
        depths=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        max_tokens=131072,
        continued=(
            "data.max_tokens=32768",
            "trainer.max_steps=150",
            "trainer.limit_val_batches=24",
            "optim.learning_rate=2e-4",
        ),
    ),
    "tiny": Scale(
        window=128,
        documents=2,
        keys_per_cell=1,
        depths=(0.0, 1.0),
        max_tokens=4096,
        continued=(
            "data.max_tokens=2048",
            "trainer.max_steps=2",
            "trainer.limit_val_batches=1",
            "optim.learning_rate=2e-4",
        ),
        train=(
            "model=tiny",
            "model.config.max_position_embeddings=128",
            "data.max_bytes=250000",
            "data.max_file_bytes=50000",
            "data.with_stdlib=false",
            "data.vocab_size=512",
            "data.max_tokens=1024",
            "data.max_document_tokens=128",
            "data.held_out_fraction=0.3",
            "data.num_workers=0",
            "optim.warmup_fraction=0.25",
            "trainer.max_steps=4",
            "trainer.limit_val_batches=2",
            "trainer.log_every_n_steps=1",
            "trainer.enable_progress_bar=false",
            "evaluation.enabled=false",
        ),
    ),
}
