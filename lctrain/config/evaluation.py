"""The settings of the evaluation at the end of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from lctrain.limits import check_lengths, check_methods, require


@dataclass(frozen=True)
class EvaluationConfig:
    """Perplexity by context length at the end of the run.

    Attributes:
        enabled: Whether to evaluate.
        lengths: Context lengths in tokens.
        documents: Number of held-out documents, the longest first; None for all.
        document_tokens: Tokens of each document, from its beginning; None for all.
        max_tokens: Tokens per forward pass; None takes the longest length.
        methods: Methods to compare on the trained model that read beyond its window, as in
            lctrain-eval. Without methods the model is measured as it was trained.
        stride: Positions that a window scores, with methods; None for half the shortest length.
        passkey_lengths: Tokens of texts in which keys are hidden, to be found with each of the
            methods; none hides no keys.
        keys_per_cell: Keys of each length and each of five depths of the text.
        begin_token: Whether each window begins with the begin token; None where the tokenizer adds
            one to a text.
    """

    enabled: bool = True
    lengths: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096])
    documents: int | None = 16
    document_tokens: int | None = None
    max_tokens: int | None = None
    methods: list[str] = field(default_factory=list)
    stride: int | None = None
    begin_token: bool | None = None
    passkey_lengths: list[int] = field(default_factory=list)
    keys_per_cell: int = 10

    def __post_init__(self) -> None:
        if self.documents is not None and self.documents < 1:
            raise ValueError(
                f"evaluation.documents must be at least 1, got {self.documents}. Use null for all "
                "of them, or evaluation.enabled=false for no evaluation."
            )
        if self.document_tokens is not None and self.document_tokens < 2:
            raise ValueError(
                f"evaluation.document_tokens must be at least 2, got {self.document_tokens}. One "
                "token leaves nothing to predict; use null for whole documents."
            )
        if self.enabled:
            check_lengths(self.lengths, self.max_tokens, "evaluation.")
        check_methods(self.methods, "evaluation.methods")
        require(
            self.stride is None or 1 <= self.stride <= min(self.lengths),
            f"evaluation.stride must be in [1, shortest length = {min(self.lengths)}], got "
            f"{self.stride}. Use null for half of it.",
        )
        if self.passkey_lengths:
            require(
                bool(self.methods),
                "evaluation.methods must name at least one with evaluation.passkey_lengths, got "
                "none. Use [plain] for the model as it is.",
            )
            check_lengths(self.passkey_lengths, None, "evaluation.passkey_")
        require(
            self.keys_per_cell >= 1,
            f"evaluation.keys_per_cell must be at least 1, got {self.keys_per_cell}. Use "
            "evaluation.passkey_lengths=[] for no keys.",
        )

    def forward_tokens(self) -> int:
        """Most tokens in a forward pass."""
        return max([2, *self.lengths]) if self.max_tokens is None else self.max_tokens
