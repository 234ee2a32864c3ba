"""Sizes of the experiment: the one for a GPU, and one that runs the same code in a minute."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """What differs between the sizes.

    Attributes:
        window: Tokens of the longest training document, W.
        train: Overrides of the experiment `dual_chunk_extension`.
    """

    window: int
    train: tuple[str, ...] = ()


SCALES = {
    "full": Scale(window=1024),
    "tiny": Scale(
        window=128,
        train=(
            "model=tiny",
            "model.config.max_position_embeddings=128",
            "data.max_bytes=600000",
            "data.with_stdlib=false",
            "data.vocab_size=512",
            "data.max_tokens=1024",
            "data.max_document_tokens=128",
            "data.held_out_fraction=0.3",
            "data.num_workers=0",
            "data.num_proc=1",
            "optim.warmup_steps=1",
            "trainer.max_steps=4",
            "trainer.limit_val_batches=2",
            "trainer.log_every_n_steps=1",
            "trainer.enable_progress_bar=false",
            "evaluation.lengths=[32,128]",
            "evaluation.documents=4",
            "evaluation.document_tokens=256",
            "evaluation.max_tokens=1024",
        ),
    ),
}
