"""passkey_retrieval: counts how often a model finds a key that is hidden in a long text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lctrain.attention import is_patched
from lctrain.data.passkey import Filler, Passkey, PasskeyFormat
from lctrain.eval.extension import Extension
from lctrain.eval.files import write_rows
from lctrain.eval.limits import check_model
from lctrain.eval.method_words import of_methods
from lctrain.eval.retrieval_plot import plot_retrieval
from lctrain.eval.runner import cut, packed_kwargs, row_kwargs
from lctrain.limits import check_lengths, check_passkeys
from lctrain.loss import evaluation_mode
from lctrain.loss.predictions import greedy_tokens
from lctrain.models.frequencies import row_frequencies
from lctrain.pluralize import pluralize

FILE_STEM = "passkey_retrieval"
DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True, eq=False)
class PasskeyTable:
    """Number of passkeys that a model found, by method, text length and depth.

    Attributes:
        found: Number of keys found by each method, [lengths, depths] int64.
        lengths: Lengths of the texts in tokens, question and answer included.
        depths: Depths of the key: fractions of the filler text before it.
        keys: Number of keys for each length and depth.
        window: Length of the texts that the model was trained on, in tokens.
        name: Name of the model; may be empty.
    """

    found: Mapping[str, np.ndarray]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    keys: int
    window: int
    name: str = ""

    def accuracy(self, method: str) -> np.ndarray:
        """Returns the fraction of the keys that were found, [lengths, depths] float64."""
        return self.found[method] / self.keys

    def as_dicts(self) -> list[dict[str, Any]]:
        """Returns a dictionary with counts and accuracy per method, length and depth."""
        return [
            {
                "method": method,
                "length": length,
                "depth": depth,
                "found": int(found[i, j]),
                "keys": self.keys,
                "accuracy": int(found[i, j]) / self.keys,
            }
            for method, found in self.found.items()
            for i, length in enumerate(self.lengths)
            for j, depth in enumerate(self.depths)
        ]

    def save(self, output_dir: str | Path) -> dict[str, Path]:
        """Writes passkey_retrieval.csv, .json and .png.

        Returns:
            The paths by "csv", "json" and "png".
        """
        settings = {"name": self.name, "window": self.window, "keys_per_cell": self.keys}
        paths = write_rows(output_dir, FILE_STEM, self.as_dicts(), settings)
        accuracy = {method: self.accuracy(method) for method in self.found}
        axes = (self.lengths, self.depths)
        plot_retrieval(accuracy, *axes, self.keys, self.window, self.name, paths["png"])
        return paths

    def __str__(self) -> str:
        lines = [
            f"Passkeys found{f' by {self.name}' if self.name else ''}: "
            f"{pluralize(self.keys, 'key')} in each cell, window {self.window:,}; depth is the "
            "share "
            "of the text before the key"
        ]
        for method in self.found:
            accuracy = self.accuracy(method)
            lines.append(f"{method:<12}" + "".join(f"{n:>9,}" for n in self.lengths))
            for j, depth in enumerate(self.depths):
                cells = "".join(f"{value:>9.0%}" for value in accuracy[:, j])
                lines.append(f"  {f'depth {depth:.2f}':<10}" + cells)
            lines.append(f"  {'mean':<10}" + "".join(f"{v:>9.0%}" for v in accuracy.mean(axis=1)))
        return "\n".join(lines)


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

    Returns:
        The table. `str()` of it is the table in text, and `save(folder)` writes files.

    Raises:
        ValueError: if an option is out of range, a length is too short for key, question and
            answer, or the model does not support a method.
    """
    lengths = check_lengths(lengths, max_tokens)
    depths = check_passkeys(depths, keys_per_cell, seed)
    if lengths[0] < format.shortest:
        raise ValueError(
            f"passkey lengths must be at least {format.shortest}, the tokens of key, question and "
            f"answer, got {lengths[0]}. Leave it out."
        )
    filler = Filler.of(documents, len(format.begin))
    device = next(model.parameters()).device if device is None else torch.device(device)
    example = format.make(np.random.default_rng(0), format.shortest, 0.0, filler, with_end=False)
    check_model(model, [example.input_ids, *map(np.asarray, documents)], lengths[-1])
    found = {e.method: np.zeros((len(lengths), len(depths)), np.int64) for e in extensions}
    total = len(extensions) * len(lengths) * len(depths) * keys_per_cell
    with tqdm(total=total, desc="Passkeys", unit="key", disable=not progress) as bar:
        for extension, words in zip(extensions, of_methods(extensions), strict=True):
            bar.set_description(f"Passkeys, {words}")
            with extension.patched(model):
                for i, length in enumerate(lengths):
                    cells = [(j, key) for j in range(len(depths)) for key in range(keys_per_cell)]
                    with extension.at(model, length):
                        for batch in _batches(cells, max(1, max_tokens // length)):
                            made = [
                                format.make(
                                    np.random.default_rng([seed, length, key]),
                                    length,
                                    depths[j],
                                    filler,
                                    with_end=False,
                                )
                                for j, key in batch
                            ]
                            right = _answered(model, made, extension.segment, device)
                            for (j, _), one in zip(batch, right, strict=True):
                                found[extension.method][i, j] += one
                            bar.update(len(batch))
    return PasskeyTable(found, lengths, depths, keys_per_cell, extensions[0].window, name)


def _batches(cells: Sequence[tuple[int, int]], size: int) -> Iterator[Sequence[tuple[int, int]]]:
    for start in range(0, len(cells), size):
        yield cells[start : start + size]


def _answered(
    model: nn.Module, made: Sequence[Passkey], segment: int | None, device: torch.device
) -> list[bool]:
    """Returns, for each document, whether greedy decoding yields its answer."""
    inputs = [passkey.input_ids[:-1] for passkey in made]  # the last token predicts nothing
    if is_patched(model):
        kwargs = packed_kwargs(cut(inputs, segment), device)
    else:
        kwargs = row_kwargs(inputs, len(inputs[0]), device)
    offsets = np.cumsum([0, *map(len, inputs)])[:-1]  # equal lengths, hence no padding
    before = [
        offset + np.arange(p.answer_start, p.answer_start + p.answer_tokens) - 1
        for offset, p in zip(offsets, made, strict=True)
    ]
    places = torch.from_numpy(np.concatenate(before)).to(device)
    lengths = torch.tensor([len(tokens) for tokens in inputs])
    own = nullcontext() if is_patched(model) else row_frequencies(model, lengths)
    with evaluation_mode(model), own:
        predicted = greedy_tokens(model, kwargs, places).cpu().numpy()
    splits = np.cumsum([len(part) for part in before])[:-1]
    return [
        bool((tokens == passkey.input_ids[passkey.answer_start :]).all())
        for tokens, passkey in zip(np.split(predicted, splits), made, strict=True)
    ]
