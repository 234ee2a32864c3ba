"""The settings of the data: how documents are tokenized, packed and loaded."""

from __future__ import annotations

from dataclasses import dataclass

from lctrain.config.paths import expand_paths
from lctrain.limits import SPECIAL_TOKENS, check_data, check_loading, named, require


@dataclass(frozen=True)
class DataConfig:
    """How documents are tokenized and packed: see `lctrain.data.PackedDataModule`.

    What is read is added by the classes in `lctrain.schemas`, one for every source.

    Attributes:
        tokenizer: Name or path; None takes a pretrained model's own, and for a model from scratch
            trains a byte-level BPE on the training split, once.
        vocab_size: Size of the tokenizer, if it is trained.
        max_tokens: Capacity of a row.
        max_document_tokens: Tokens of a document in a row; None for all that a row has room for.
        overlong: split, truncate or drop longer documents.
        packing_window: Documents packed at a time.
        balance_window: Steps within which ranks get rows of similar attention work.
        held_out_fraction: Share of the documents to hold out.
        passkey_fraction: Share of every training row that teaches retrieval.
        num_workers: Processes that build batches.
        num_proc: Processes that tokenize; None for one, in which fast tokenizers use all cores.
        seed: Seed of the shuffle.
        cache_dir: Where documents, tokens and the tokenizer are kept.
        special_tokens: What the text of a special token inside a document becomes: text, or the
            token, for documents that are trusted.
    """

    tokenizer: str | None = None
    vocab_size: int = 8192
    max_tokens: int = 4096
    max_document_tokens: int | None = None
    overlong: str = "split"
    packing_window: int = 100_000
    balance_window: int = 256
    held_out_fraction: float = 0.05
    passkey_fraction: float = 0.0
    num_workers: int = 0
    num_proc: int | None = None
    seed: int = 0
    cache_dir: str | None = None
    special_tokens: str = "text"

    def __post_init__(self) -> None:
        expand_paths(self, "data.", "cache_dir")
        check_data(self, "data.")
        check_loading(self, "data.")
        require(
            self.special_tokens in SPECIAL_TOKENS,
            f"data.special_tokens must be one of {', '.join(SPECIAL_TOKENS)}, got "
            f"{self.special_tokens!r}. text reads them as other text.",
        )
        check_source = getattr(super(), "__post_init__", None)  # the schemas add a source
        if check_source is not None:
            with named("data."):
                check_source()
