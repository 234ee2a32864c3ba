"""Evaluation of long contexts: tasks, perplexity by context length, and passkey retrieval."""

from lctrain.eval.begin import BeginTokens, begin_tokens
from lctrain.eval.comparison import MethodComparison
from lctrain.eval.extension import Extension, trained_window
from lctrain.eval.longest import longest_documents
from lctrain.eval.masked import masked_perplexity_by_length
from lctrain.eval.passkey_table import PasskeyTable
from lctrain.eval.perplexity import compare_methods, perplexity_by_length
from lctrain.eval.plots import plot_perplexity
from lctrain.eval.ratio import token_mean
from lctrain.eval.reader import Reader
from lctrain.eval.records import Item, Measure, Result, Subject, Table
from lctrain.eval.retrieval import passkey_retrieval
from lctrain.eval.run_task import Run, computed
from lctrain.eval.runner import ScoredTokens, score_windows
from lctrain.eval.table import PerplexityRow, PerplexityTable
from lctrain.eval.task import Task
from lctrain.eval.windows import Windows, cut_windows
from lctrain.limits import DUAL_CHUNK_METHODS, METHODS, check_lengths, check_methods

__all__ = [
    "DUAL_CHUNK_METHODS",
    "METHODS",
    "BeginTokens",
    "Extension",
    "Item",
    "Measure",
    "MethodComparison",
    "PasskeyTable",
    "PerplexityRow",
    "PerplexityTable",
    "Reader",
    "Result",
    "Run",
    "ScoredTokens",
    "Subject",
    "Table",
    "Task",
    "Windows",
    "begin_tokens",
    "check_lengths",
    "check_methods",
    "compare_methods",
    "computed",
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
