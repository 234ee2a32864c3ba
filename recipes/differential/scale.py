"""Sizes of the experiment: two for a GPU, and one that runs the same code in minutes on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scale:
    """Sizes of the experiment.

    Attributes:
        shares: Lengths of the passkey texts as fractions of the trained window, rising; the last is
            1.
        keys_per_cell: Number of passkeys per length and depth.
        depths: Positions of the key, as fractions of the filler text.
        logit_documents: Number of held-out documents searched for the largest logit.
        max_tokens: Tokens in a forward pass of the evaluations.
        parity_rows: Rows per step of the stage `parity`; a row is as long as the window.
        parity_steps: Steps of the stage `parity`.
        train: Hydra overrides of the experiment `differential`.
        of_variant: Further Hydra overrides by variant. V2 has smaller feed-forward layers, because
            it has twice the query heads.
    """

    shares: tuple[float, ...]
    keys_per_cell: int
    depths: tuple[float, ...]
    logit_documents: int
    max_tokens: int
    parity_rows: int
    parity_steps: int
    train: tuple[str, ...] = ()
    of_variant: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


SCALES = {
    "full": Scale(
        shares=(0.125, 0.25, 0.5, 1.0),
        keys_per_cell=20,
        depths=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        logit_documents=16,
        max_tokens=32768,
        parity_rows=4,
        parity_steps=40,
        train=("trainer.enable_progress_bar=false",),
        of_variant={"v2": ("model.config.intermediate_size=896",)},
    ),
    "small": Scale(
        shares=(0.5, 1.0),
        keys_per_cell=4,
        depths=(0.0, 0.5, 1.0),
        logit_documents=4,
        max_tokens=16384,
        parity_rows=4,
        parity_steps=20,
        train=(
            "model.config.hidden_size=256",
            "model.config.intermediate_size=680",
            "model.config.num_hidden_layers=4",
            "model.config.num_attention_heads=4",
            "model.config.num_key_value_heads=4",
            "model.config.max_position_embeddings=1024",
            "data.max_bytes=12000000",
            "data.vocab_size=4096",
            "data.max_document_tokens=1024",
            "data.num_workers=1",
            "optim.warmup_fraction=0.1",
            "trainer.max_steps=300",
            "trainer.limit_val_batches=16",
            "trainer.enable_progress_bar=false",
        ),
        of_variant={"v2": ("model.config.intermediate_size=592",)},
    ),
    "tiny": Scale(
        shares=(0.5, 1.0),
        keys_per_cell=1,
        depths=(0.0, 1.0),
        logit_documents=2,
        max_tokens=1024,
        parity_rows=2,
        parity_steps=6,
        train=(
            "model.config.hidden_size=64",
            "model.config.intermediate_size=85",
            "model.config.num_hidden_layers=2",
            "model.config.num_attention_heads=2",
            "model.config.num_key_value_heads=2",
            "model.config.head_dim=32",
            "model.config.max_position_embeddings=256",
            "data.max_bytes=400000",
            "data.with_stdlib=false",
            "data.vocab_size=512",
            "data.max_tokens=1024",
            "data.max_document_tokens=256",
            "data.held_out_fraction=0.3",
            "data.num_workers=0",
            "optim.warmup_fraction=0.25",
            "trainer.max_steps=3",
            "trainer.limit_val_batches=2",
            "trainer.log_every_n_steps=1",
            "trainer.enable_progress_bar=false",
        ),
        of_variant={"v2": ("model.config.intermediate_size=64",)},
    ),
}
