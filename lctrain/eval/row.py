"""PerplexityRow: the perplexity at one context length."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PerplexityRow:
    """How well the same tokens are predicted with contexts of at most `length` tokens.

    Attributes:
        length: most tokens of context.
        perplexity: exp(loss).
        perplexity_low: exp(loss - stderr).
        perplexity_high: exp(loss + stderr).
        loss: token-weighted mean of the negative log-likelihood, nats per token.
        stderr: standard error of `loss` over documents (see `token_mean`); NaN for one document.
        gain: loss at the shortest length minus this loss. Both are of the same tokens, so the
            differences between documents cancel, and `gain_stderr` is the right yardstick for
            whether more context helps.
        gain_stderr: standard error of `gain` over documents.
        mean_context: tokens that a scored token really saw, on average. It stops growing with
            `length` where the documents end.
        documents: documents with a scored token.
        tokens: scored tokens.
        windows: windows that were run.
        begun: number of windows that began with the begin tokens; 0 without begin tokens.
    """

    length: int
    perplexity: float
    perplexity_low: float
    perplexity_high: float
    loss: float
    stderr: float
    gain: float
    gain_stderr: float
    mean_context: float
    documents: int
    tokens: int
    windows: int = 0
    begun: int = 0
