"""PerplexityRow: the perplexity at one context length."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PerplexityRow:
    """Loss and perplexity of the scored tokens with contexts of at most `length` tokens.

    Attributes:
        length: Largest number of tokens in a context.
        perplexity: exp(loss).
        perplexity_low: exp(loss - stderr).
        perplexity_high: exp(loss + stderr).
        loss: Mean negative log-likelihood over tokens, in nats per token.
        stderr: Standard error of `loss` over documents (see `token_mean`); NaN for one document.
        gain: Loss at the shortest length minus `loss`. Both losses are of the same tokens, so
            differences between documents cancel. A `gain` well above `gain_stderr` means that more
            context helps.
        gain_stderr: Standard error of `gain` over documents.
        mean_context: Mean number of tokens that a scored token was predicted from. It stops growing
            with `length` once the windows hold whole documents.
        documents: Number of documents with a scored token.
        tokens: Number of scored tokens.
        windows: Number of windows that the model read.
        begun: Number of windows that began with the begin tokens; 0 without begin tokens.
        interval_low: Lower end of the 95 % interval of the perplexity, by bootstrap over documents;
            NaN for fewer than three documents.
        interval_high: Upper end of that interval.
        short_documents: Number of scored documents of fewer than `length` tokens.
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
    interval_low: float = math.nan
    interval_high: float = math.nan
    short_documents: int = 0
