"""How well a model uses long contexts."""

from lctrain.eval.perplexity import check_lengths, longest_documents, perplexity_by_length
from lctrain.eval.plots import plot_perplexity
from lctrain.eval.ratio import token_mean
from lctrain.eval.runner import ScoredTokens, score_windows
from lctrain.eval.table import PerplexityRow, PerplexityTable
from lctrain.eval.windows import Windows, cut_windows

__all__ = [
    "PerplexityRow",
    "PerplexityTable",
    "ScoredTokens",
    "Windows",
    "check_lengths",
    "cut_windows",
    "longest_documents",
    "perplexity_by_length",
    "plot_perplexity",
    "score_windows",
    "token_mean",
]
