"""Evaluation of long contexts: perplexity by context length, and passkey retrieval."""

from lctrain.eval.begin import BeginTokens, begin_tokens
from lctrain.eval.comparison import MethodComparison, compare_methods
from lctrain.eval.extension import Extension, trained_window
from lctrain.eval.masked import masked_perplexity_by_length
from lctrain.eval.perplexity import longest_documents, perplexity_by_length
from lctrain.eval.plots import plot_perplexity
from lctrain.eval.ratio import token_mean
from lctrain.eval.retrieval import PasskeyTable, passkey_retrieval
from lctrain.eval.runner import ScoredTokens, score_windows
from lctrain.eval.table import PerplexityRow, PerplexityTable
from lctrain.eval.windows import Windows, cut_windows
from lctrain.limits import DUAL_CHUNK_METHODS, METHODS, check_lengths, check_methods

__all__ = [
    "DUAL_CHUNK_METHODS",
    "METHODS",
    "BeginTokens",
    "Extension",
    "MethodComparison",
    "PasskeyTable",
    "PerplexityRow",
    "PerplexityTable",
    "ScoredTokens",
    "Windows",
    "begin_tokens",
    "check_lengths",
    "check_methods",
    "compare_methods",
    "cut_windows",
    "longest_documents",
    "masked_perplexity_by_length",
    "passkey_retrieval",
    "perplexity_by_length",
    "plot_perplexity",
    "score_windows",
    "token_mean",
    "trained_window",
]
