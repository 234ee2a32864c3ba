"""Everything that an evaluation by itself is set by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lctrain.config.attention import AttentionConfig
from lctrain.config.model import PretrainedModelConfig
from lctrain.config.paths import PathsConfig
from lctrain.config.schema import MISSING
from lctrain.local_paths import check_run_name

MIN_MAX_TOKENS = 8192  # of a forward pass, where nothing else is said


@dataclass(frozen=True)
class PasskeyConfig:
    """Settings of `lctrain.eval.passkey_retrieval`.

    Attributes:
        lengths: Tokens of the texts; None for the lengths of the evaluation.
        methods: None for the methods of the evaluation.
        depths: Fraction of the filler text before the key.
        keys_per_cell: Keys of each length and depth.
        seed: Seed of keys and text.
    """

    lengths: list[int] | None = None
    methods: list[str] | None = None
    depths: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    keys_per_cell: int = 20
    seed: int = 0


@dataclass(frozen=True)
class EvalConfig:
    """Everything that `lctrain-eval` does.

    Attributes:
        name: Name of the evaluation; part of its folder.
        model: The evaluated model. On the command line, `model=x` is short for
            `model.name_or_path=x`.
        data: The documents, with the settings of training; the tokenizer is the model's.
        attention: How the model's attention is patched; None leaves it as it is. The numbers are
            the same, up to rounding, unless it is dual chunk attention. With methods, its options
            are those of the methods that use it, and the others use flash.
        logger: Loggers by name, each with a `_target_`.
        paths: Folder of the evaluation.
        split: "held_out" for the documents that training on this data holds out; "all" for every
            document.
        tasks: perplexity, passkey, or both.
        methods: Methods to compare that read beyond the window: see `lctrain.eval.extension`.
            Without methods the model is evaluated unchanged.
        window: Length of the texts that the model was trained on, in tokens. None takes the value
            of its config. For dual chunk attention, `attention.window` takes precedence.
        documents: Number of documents, the longest first; None for all.
        document_tokens: Tokens of each document, from its beginning; None for all.
        lengths: Context lengths in tokens.
        max_tokens: Tokens in a forward pass. None takes the longest length, but at least 8,192.
        overlap: Fraction of a window that is only context; not used with methods.
        stride: Positions that a window scores at every length; None for a share of each length,
            with methods for half the shortest length.
        min_context: Score tokens that have at least this many predecessors; None for all of them,
            with methods for those for which every length is filled.
        begin_token: Whether each window begins with the begin token; None where the tokenizer adds
            one to a text. Of texts with a passkey, each is whole and begins as the tokenizer's.
        passkey: Settings of the task passkey.
        dtype: Type of the weights: auto (as they are stored), float32, bfloat16 or float16.
        device: auto, cpu, cuda, cuda:1, ...
    """

    name: str = "eval"
    model: PretrainedModelConfig = MISSING
    data: Any = MISSING
    attention: AttentionConfig | None = None
    logger: dict[str, Any] = field(default_factory=dict)
    paths: PathsConfig = MISSING
    split: str = "held_out"
    tasks: list[str] = field(default_factory=lambda: ["perplexity"])
    methods: list[str] = field(default_factory=list)
    window: int | None = None
    documents: int | None = 16
    document_tokens: int | None = None
    lengths: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096])
    max_tokens: int | None = None
    overlap: float = 0.5
    stride: int | None = None
    min_context: int | None = None
    begin_token: bool | None = None
    passkey: PasskeyConfig = field(default_factory=PasskeyConfig)
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_run_name(self.name)

    def forward_tokens(self) -> int:
        """Largest number of tokens in a forward pass."""
        if self.max_tokens is not None:
            return self.max_tokens
        return max([MIN_MAX_TOKENS, *self.lengths, *(self.passkey.lengths or ())])
