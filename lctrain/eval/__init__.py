"""Evaluation of long contexts: tasks, perplexity by context length, and passkey retrieval."""

from lctrain.eval.answers import MEASURES as ANSWER_MEASURES
from lctrain.eval.answers import score_prompts
from lctrain.eval.begin import BeginTokens, begin_tokens
from lctrain.eval.comparison import MethodComparison
from lctrain.eval.extension import Extension, trained_window
from lctrain.eval.longest import longest_documents
from lctrain.eval.masked import masked_perplexity_by_length
from lctrain.eval.passkey_table import PasskeyTable
from lctrain.eval.perplexity import compare_methods, perplexity_by_length
from lctrain.eval.plots import plot_perplexity
from lctrain.eval.prompt import Prompt, TokenPrompt, fitting_units, tokenized
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
    "ANSWER_MEASURES",
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
    "Prompt",
    "Reader",
    "Result",
    "Run",
    "ScoredTokens",
    "Subject",
    "Table",
    "Task",
    "TokenPrompt",
    "Windows",
    "begin_tokens",
    "check_lengths",
    "check_methods",
    "compare_methods",
    "computed",
    "cut_windows",
    "fitting_units",
    "longest_documents",
    "masked_perplexity_by_length",
    "passkey_retrieval",
    "perplexity_by_length",
    "plot_perplexity",
    "score_prompts",
    "score_windows",
    "token_mean",
    "tokenized",
    "trained_window",
]
