"""passkey_retrieval: counts how often a model finds a key that is hidden in a long text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from lctrain.data.passkey import PasskeyFormat
from lctrain.distributed import ONE_RANK, Topology
from lctrain.eval.extension import Extension
from lctrain.eval.passkey_table import PasskeyTable
from lctrain.eval.records import Subject
from lctrain.eval.run_task import Run, computed
from lctrain.eval.tasks.passkey import DEPTHS, PasskeyRetrieval
from lctrain.limits import check_lengths


def passkey_retrieval(
    model: nn.Module,
    format: PasskeyFormat,
    documents: Sequence[np.ndarray],
    lengths: Sequence[int],
    extensions: Sequence[Extension],
    *,
    max_tokens: int,
    depths: Sequence[float] = DEPTHS,
    keys_per_cell: int = 20,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
    name: str = "",
    ranks: Topology = ONE_RANK,
) -> PasskeyTable:
    """Hides keys in texts, and counts the keys that a model retrieves word for word.

    A key is found if greedy decoding after the question yields exactly the tokens of the key. One
    forward pass over text, question and answer decides: the most likely next token must be right at
    every token of the answer. The keys and texts depend only on the seed, the length and the number
    of the key. Every method therefore reads the same texts, and every depth has the same keys in
    the same filler.

    Args:
        model: A causal LM that is not patched; it is unchanged afterwards.
        format: Passkey format of the model's tokenizer.
        documents: Token ids of the documents that keys are hidden in, [n] integers each. The model
            should not have been trained on these documents.
        lengths: Lengths of the texts in tokens, question and answer included.
        extensions: The methods to compare, all with the same window.
        max_tokens: Largest number of tokens in a forward pass.
        depths: Depths of the key: fractions of the filler text before it, in [0, 1].
        keys_per_cell: Number of keys for each length and depth.
        seed: Seed of the keys and of the choice of filler.
        device: Device of the model; None takes the device of its first parameter.
        progress: Whether to show a progress bar.
        name: Name of the model.
        ranks: Ranks that share the work, all of which call this function.

    Returns:
        The table. `str()` of it is the table in text, and `save(folder)` writes files.

    Raises:
        ValueError: if an option is out of range, a length is too short for key, question and
            answer, or the model does not support a method.
    """
    lengths = check_lengths(lengths, max_tokens)
    task = PasskeyRetrieval(depths=depths, keys_per_cell=keys_per_cell, seed=seed, format=format)
    subject = Subject(model, window=extensions[0].window, name=name)
    task.texts = documents
    run = Run.prepared(
        task, subject, extensions, lengths, max_tokens=max_tokens, device=device, ranks=ranks
    )
    return task.table(computed(run, progress))
