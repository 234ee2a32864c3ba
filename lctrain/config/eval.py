"""The settings of the command lctrain-eval."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lctrain.config.attention import AttentionConfig
from lctrain.config.model import PretrainedModelConfig
from lctrain.config.paths import PathsConfig
from lctrain.config.schema import MISSING
from lctrain.config.tasks import (
    HarnessConfig,
    LongPerplexityConfig,
    NeedleConfig,
    PasskeyConfig,
    RulerConfig,
)
from lctrain.local_paths import check_run_name

MIN_MAX_TOKENS = 8192  # smallest default of max_tokens, the tokens in a forward pass


@dataclass(frozen=True)
class EvalConfig:
    """Settings of `lctrain-eval`, which evaluates a stored model.

    Attributes:
        name: Name of the evaluation; part of the name of its folder.
        model: The evaluated model. On the command line, `model=x` is short for
            `model.name_or_path=x`.
        data: Source of the documents, with the settings used in training. The tokenizer is the
            model's.
        attention: Attention that replaces the model's own; None replaces nothing. Flash and
            differential attention change results by rounding only. With methods, the options apply
            to the methods that use this attention, and all other methods use flash.
        logger: Loggers by name, each with a `_target_`.
        paths: Folder of the evaluation.
        split: "held_out" for the documents that training on this data holds out; "all" for every
            document.
        tasks: Names of the tasks to run: lctrain's are in `lctrain.config.TASKS`. None runs
            perplexity, or masked_perplexity for a masked language model.
        own_tasks: Settings of tasks of your own by name, each with the class that it builds.
        methods: Methods of reading beyond the trained window to compare: see
            `lctrain.eval.extension`. Without methods the model is evaluated unchanged.
        window: Length of the texts that the model was trained on, in tokens. None takes the value
            of its config. For dual chunk attention, `attention.window` takes precedence.
        documents: Number of documents, the longest first; None for all.
        document_tokens: Number of tokens to read of each document, from its beginning; None for
            all.
        lengths: Context lengths in tokens.
        max_tokens: Tokens in a forward pass. None takes the longest length, but at least 8,192.
        overlap: Fraction of each evaluation window that is context and not scored; unused with
            methods.
        stride: Number of positions that an evaluation window scores, the same at every length.
            The default without methods is (1 - overlap) * length; with methods it is half of the
            shortest length.
        min_context: Smallest number of preceding tokens of a scored token. The default without
            methods is 1; with methods it is the longest length - stride + 1.
        begin_token: Whether each evaluation window begins with the begin token. None does so if the
            tokenizer adds a begin token to texts. Passkey texts begin as the tokenizer begins
            texts.
        passkey: Settings of the task passkey.
        needle: Settings of the task needle.
        ruler: Settings of the task ruler.
        longppl: Settings of the task longppl.
        harness: Settings of the task harness.
        resume: Evaluation that was stopped and goes on: its folder, or "last" for the newest one of
            this name with finished cells and without a report. These cells are not computed again.
        compare: Folders of finished evaluations to compare; then nothing is evaluated.
        dtype: Type of the weights: auto (as they are stored), float32, bfloat16 or float16.
        device: Device of the model: auto, cpu, cuda, cuda:1, ...
    """

    name: str = "eval"
    model: PretrainedModelConfig = MISSING
    data: Any = MISSING
    attention: AttentionConfig | None = None
    logger: dict[str, Any] = field(default_factory=dict)
    paths: PathsConfig = MISSING
    split: str = "held_out"
    tasks: list[str] | None = None
    own_tasks: dict[str, Any] = field(default_factory=dict)
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
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    ruler: RulerConfig = field(default_factory=RulerConfig)
    longppl: LongPerplexityConfig = field(default_factory=LongPerplexityConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    resume: str | None = None
    compare: list[str] = field(default_factory=list)
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_run_name(self.name)

    def forward_tokens(self) -> int:
        """Returns the largest number of tokens in a forward pass."""
        if self.max_tokens is not None:
            return self.max_tokens
        tasks = (self.passkey, self.needle, self.ruler, self.longppl, self.harness)
        own = [task.lengths or [] for task in tasks]
        return max([MIN_MAX_TOKENS, *self.lengths, *(n for lengths in own for n in lengths)])
