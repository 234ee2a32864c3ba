"""The names of the evaluation tasks, and the settings that some of them have."""

from __future__ import annotations

from dataclasses import dataclass, field

from lctrain.limits import check_by, check_longppl, check_passkeys, check_ruler, require

TASKS = {
    "perplexity": "lctrain.eval.tasks.perplexity.Perplexity",
    "masked_perplexity": "lctrain.eval.tasks.masked.MaskedPerplexity",
    "sliding_perplexity": "lctrain.eval.tasks.sliding.SlidingPerplexity",
    "context_gain": "lctrain.eval.tasks.context_gain.ContextGain",
    "longppl": "lctrain.eval.tasks.longppl.LongPerplexity",
    "passkey": "lctrain.eval.tasks.passkey.PasskeyRetrieval",
    "needle": "lctrain.eval.tasks.needle.Needle",
    "ruler": "lctrain.eval.tasks.ruler.Ruler",
    "harness": "lctrain.eval.tasks.harness.Harness",
}
"""Classes of lctrain's tasks by the name in `tasks`; a class has `of(config)`."""

DEFAULT_TASKS = {"causal": ["perplexity"], "mlm": ["masked_perplexity"]}
"""Names of the tasks that run if none is named, by the kind of the model."""


@dataclass(frozen=True)
class PasskeyConfig:
    """Settings of `lctrain.eval.passkey_retrieval`.

    Attributes:
        lengths: Lengths of the texts in tokens; None for `lengths` of the evaluation.
        methods: Methods to compare; None for `methods` of the evaluation.
        depths: Depths of the key: fractions of the text before it, in [0, 1].
        keys_per_cell: Number of keys for each length and depth.
        seed: Seed of the keys and of the choice of text.
        by: "likelihood" asks whether greedy decoding yields the key, from one forward pass;
            "generation" lets the model answer.
    """

    lengths: list[int] | None = None
    methods: list[str] | None = None
    depths: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    keys_per_cell: int = 20
    seed: int = 0
    by: str = "likelihood"

    def __post_init__(self) -> None:
        check_by(self.by, "passkey.by")


@dataclass(frozen=True)
class NeedleConfig:
    """Settings of the task needle, a sentence hidden in text.

    Attributes:
        lengths: Lengths in tokens, answer included; None for `lengths` of the evaluation.
        methods: Methods to compare; None for `methods` of the evaluation.
        depths: Depths of the needle: fractions of the text before it, in [0, 1].
        needles: Number of needles for each length and depth.
        seed: Seed of the needles and of the choice of text.
        by: "generation" lets the model answer; "likelihood" asks whether greedy decoding yields the
            expected answer, for base models.
    """

    lengths: list[int] | None = None
    methods: list[str] | None = None
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    needles: int = 4
    seed: int = 0
    by: str = "generation"

    def __post_init__(self) -> None:
        check_passkeys(self.depths, self.needles, self.seed, "needle.", "needles")
        check_by(self.by, "needle.by")


@dataclass(frozen=True)
class RulerConfig:
    """Settings of the task ruler, RULER's synthetic tasks.

    Attributes:
        lengths: Lengths in tokens, answer included; None for `lengths` of the evaluation.
        methods: Methods to compare; None for `methods` of the evaluation.
        tasks: Names of RULER's tasks; None for all but qa, which needs `questions`.
        items: Number of prompts of each task at each length.
        seed: Seed of the prompts.
        by: "generation" lets the model answer; "likelihood" asks whether greedy decoding yields the
            expected answer, for base models.
        questions: File of JSON lines with the keys question, answers (a list) and context.
    """

    lengths: list[int] | None = None
    methods: list[str] | None = None
    tasks: list[str] | None = None
    items: int = 10
    seed: int = 0
    by: str = "generation"
    questions: str | None = None

    def __post_init__(self) -> None:
        check_ruler(self.tasks, self.items, self.seed, self.by, self.questions)


@dataclass(frozen=True)
class LongPerplexityConfig:
    """Settings of the task longppl, the perplexity of key tokens.

    Attributes:
        lengths: Lengths of the long context in tokens; None for `lengths` of the evaluation.
        methods: Methods to compare; None for `methods` of the evaluation.
        evaluator: Model that chooses the key tokens, a folder or hub name with the same tokenizer;
            None for the evaluated model itself, without a method.
        short_context: Largest number of tokens in a short context.
        step: Number of tokens that a window of the short context scores.
        gain: Smallest drop of the loss of a key token from the short to the long context, in nats.
        loss: Largest loss of a key token with the long context, in nats.
    """

    lengths: list[int] | None = None
    methods: list[str] | None = None
    evaluator: str | None = None
    short_context: int = 4096
    step: int = 1024
    gain: float = 2.0
    loss: float = 2.0

    def __post_init__(self) -> None:
        check_longppl(self.short_context, self.step, self.lengths)


@dataclass(frozen=True)
class HarnessConfig:
    """Settings of the task harness, which runs lm-evaluation-harness (pip install lm_eval).

    Attributes:
        lengths: Lengths in tokens; None for `lengths` of the evaluation.
        methods: Methods to compare; None for `methods` of the evaluation.
        tasks: Names of tasks of the harness.
        include_path: Folder with tasks of your own as the harness reads them; None for none.
        limit: Largest number of documents of each task; None for all.
        batch_size: Number of prompts in a forward pass.
    """

    lengths: list[int] | None = None
    methods: list[str] | None = None
    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    limit: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            require(
                value is None or value >= 1,
                f"harness.{name} must be at least 1, got {value}. Raise it.",
            )
