"""The settings of the data: how documents are tokenized, packed and loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypedDict

from lctrain.config.paths import expand_paths
from lctrain.limits import (
    MIN_TOKENS,
    OVERLONG,
    SPECIAL_TOKENS,
    check_passkey_source,
    check_stream,
    named,
    require,
)


class DataOptions(TypedDict, total=False):
    """The fields of `DataSettings` as keyword arguments, for editors and type checkers.

    Defaults and checks are those of `DataSettings`; a test compares names and types.
    """

    vocab_size: int
    max_tokens: int
    max_document_tokens: int | None
    overlong: str
    packing_window: int
    balance_window: int
    held_out_fraction: float
    passkey_fraction: float
    num_workers: int
    num_proc: int | None
    seed: int
    cache_dir: str | os.PathLike[str] | None
    special_tokens: str
    mask_fraction: float | None


@dataclass(frozen=True)
class DataSettings:
    """Settings of `lctrain.PackedDataModule`, which are also keys of the config group `data`.

    Attributes:
        vocab_size: Vocabulary size of the tokenizer, if a tokenizer is trained.
        max_tokens: Capacity of a row in tokens, >= 2.
        max_document_tokens: Longest document in a row, in tokens. At least 2; at most, and by
            default, max_tokens minus the tokens of passkey documents. A model with a short window
            can thus be trained on long rows.
        overlong: Treatment of a document longer than max_document_tokens: "split" it into pieces,
            "truncate" it to its first tokens, or "drop" it.
        packing_window: Number of documents that are packed together; a row holds documents of one
            window.
        balance_window: Number of steps within which rows are sorted by attention work, so that the
            ranks get rows of similar work at every step.
        held_out_fraction: Fraction of the documents to hold out, in [0, 1). Unused if the source
            has its own held-out data.
        passkey_fraction: Fraction of the tokens of every training row, in [0, 1), that belong to
            passkey documents, which teach retrieval. A tenth of their keys stands at each end
            of the text. Held-out rows have none.
        num_workers: Number of worker processes that build batches; 0 builds them in this process.
        num_proc: Number of processes that tokenize; None for one, in which fast tokenizers use all
            cores.
        seed: Seed of the shuffle.
        cache_dir: Cache folder of documents, tokens and the trained tokenizer. None takes
            $LCTRAIN_CACHE, else $XDG_CACHE_HOME/lctrain, else ~/.cache/lctrain.
        special_tokens: "text" keeps the text of a special token inside a document as text; "token"
            makes it the token, for trusted documents.
        mask_fraction: Share of the tokens that a masked language model has to predict, in (0, 1).
            None takes 0.15 for masked language models, and masks nothing otherwise.

    Raises:
        ValueError: if a setting is out of range.
    """

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
    cache_dir: str | os.PathLike[str] | None = None
    special_tokens: str = "text"
    mask_fraction: float | None = None

    def __post_init__(self) -> None:
        self._check()

    def _check(self, prefix: str = "") -> None:
        """Raises ValueError for the first setting that is out of range.

        Args:
            prefix: Text before a setting's name in messages, such as "data." on the command line.
        """
        self._check_rows(prefix)
        self._check_room_for_text(prefix)
        self._check_masking(prefix)
        least = {
            "packing_window": (1, "Raise it."),
            "num_proc": (
                1,
                "Use None (null) for one process, in which fast tokenizers use all cores.",
            ),
            "num_workers": (0, "Raise it."),
            "balance_window": (1, "Use the default, 256."),
        }
        for name, (bound, remedy) in least.items():
            value = getattr(self, name)
            require(
                value is None or value >= bound,
                f"{prefix}{name} must be at least {bound}, got {value}. {remedy}",
            )
        require(
            self.special_tokens in SPECIAL_TOKENS,
            f"{prefix}special_tokens must be one of {', '.join(SPECIAL_TOKENS)}, got "
            f"{self.special_tokens!r}. text reads them as other text.",
        )

    def _check_rows(self, prefix: str) -> None:
        """Raises ValueError unless the lengths and fractions of rows and documents are in range."""
        require(
            self.max_tokens >= MIN_TOKENS,
            f"{prefix}max_tokens must be at least {MIN_TOKENS}, got {self.max_tokens}. A token "
            f"needs a next one to predict; raise {prefix}max_tokens.",
        )
        most = self.max_document_tokens
        require(
            most is None or MIN_TOKENS <= most <= self.max_tokens,
            f"{prefix}max_document_tokens must be in [{MIN_TOKENS}, max_tokens = "
            f"{self.max_tokens}], got {most}. Use null for documents as long as a row.",
        )
        require(
            self.overlong in OVERLONG,
            f"{prefix}overlong must be one of {', '.join(OVERLONG)}, got {self.overlong!r}. split "
            "loses no token.",
        )
        require(
            0 <= self.held_out_fraction < 1,
            f"{prefix}held_out_fraction must be in [0, 1), got {self.held_out_fraction}. It is a "
            "share of the documents; 0 holds none out.",
        )
        require(
            0 <= self.passkey_fraction < 1,
            f"{prefix}passkey_fraction must be in [0, 1), got {self.passkey_fraction}. It is a "
            "share of the tokens of every training row; 0 adds none.",
        )

    def _check_masking(self, prefix: str) -> None:
        """Raises ValueError unless the share of masked tokens is in range and fits the texts."""
        if self.mask_fraction is None:
            return
        require(
            0 < self.mask_fraction < 1,
            f"{prefix}mask_fraction must be in (0, 1), got {self.mask_fraction}. BERT masks 0.15 "
            "of the tokens.",
        )
        require(
            self.passkey_fraction == 0,
            f"{prefix}passkey_fraction must be 0 with masked tokens, got {self.passkey_fraction}. "
            "Passkeys teach a causal model.",
        )

    def _check_room_for_text(self, prefix: str) -> None:
        """Raises ValueError unless a row has room for text beside its passkey documents."""
        room = self.max_tokens - round(self.max_tokens * self.passkey_fraction)
        require(
            room >= MIN_TOKENS,
            f"{prefix}passkey_fraction must leave at least {MIN_TOKENS} of max_tokens = "
            f"{self.max_tokens} for text, got {self.passkey_fraction}, which leaves {room}. Lower "
            "it.",
        )
        require(
            self.max_document_tokens is None or self.max_document_tokens <= room,
            f"{prefix}max_document_tokens must be at most {room}, what passkey_fraction = "
            f"{self.passkey_fraction} leaves of max_tokens = {self.max_tokens} for text, got "
            f"{self.max_document_tokens}. Lower passkey_fraction, raise max_tokens, or use null "
            "for documents as long as the room.",
        )


@dataclass(frozen=True)
class DataConfig(DataSettings):
    """Settings of the config group `data` that do not depend on the source of documents.

    Each subclass in `lctrain.schemas` adds the settings of one source.

    Attributes:
        tokenizer: Name or path of the tokenizer. None takes the tokenizer of a pretrained model;
            for a model with random weights it trains a byte-level BPE on the training split.
        held_out_sets: Further held-out sets by name, each with a loss of its own in the log: the
            `kind` of a source (stdlib, packages, text, jsonl, parquet, hub or chat) and its
            settings. None adds none.
    """

    cache_dir: str | None = None  # OmegaConf does not support os.PathLike
    tokenizer: str | None = None
    held_out_sets: Any = None  # a mapping; Hydra would not add keys to one in the schema

    def __post_init__(self) -> None:
        expand_paths(self, "data.", "cache_dir")
        self._check("data.")
        check_source = getattr(super(DataSettings, self), "__post_init__", None)
        if check_source is not None:  # the schemas add a source
            with named("data."):
                check_source()
            check_stream(self, self.passkey_fraction, "data.")
            check_passkey_source(self, self.passkey_fraction, "data.")
