"""The settings of the evaluation at the end of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from lctrain.limits import check_lengths, check_methods, require


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of the evaluation at the end of a training run: perplexity by context length.

    Attributes:
        enabled: Whether to evaluate.
        lengths: Context lengths in tokens.
        documents: Number of held-out documents, the longest first; None for all.
        document_tokens: Number of tokens to read of each document, from its beginning; None for
            all.
        max_tokens: Tokens in a forward pass; None takes the longest length.
        methods: Methods of reading beyond the trained window to compare, as in lctrain-eval.
            Without methods the model is evaluated as it was trained.
        stride: Number of positions that an evaluation window scores; None for half of the shortest
            length. Used with methods only.
        passkey_lengths: Lengths in tokens of texts with a hidden key, for the passkey test of each
            method. An empty list runs no passkey test.
        keys_per_cell: Number of keys for each length and each of five depths of the passkey test.
        passkey_model: Model that the passkey test reads with instead of the trained model:
            "shipped" for the small model in lctrain's wheel, a folder, or a name on the Hugging
            Face hub. None tests the trained model. Unused without passkey_lengths.
        begin_token: Whether each evaluation window begins with the begin token. None does so if the
            tokenizer adds a begin token to texts.
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
    passkey_model: str | None = None

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
        """Returns the largest number of tokens in a forward pass."""
        return max([2, *self.lengths]) if self.max_tokens is None else self.max_tokens
