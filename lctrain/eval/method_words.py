"""Names of the methods of reading beyond the window, for pictures and progress bars."""

from __future__ import annotations

from collections.abc import Sequence

from lctrain.eval.extension import Extension

_WORDS = {
    "plain": "plain RoPE",
    "linear": "position interpolation",
    "ntk": "NTK-aware RoPE",
    "yarn": "YaRN",
    "dual_chunk": "dual chunk attention",
    "dual_chunk_yarn": "dual chunk attention, sharper logits",
    "intra_chunk": "each window by itself",
}


def method_words(method: str) -> str:
    """Returns the name of a method for pictures; an unknown method is returned unchanged.

    Args:
        method: Name of the method in `lctrain-eval methods=[...]`.
    """
    return _WORDS.get(method, method)


def of_methods(extensions: Sequence[Extension]) -> list[str]:
    """Returns one text per method for progress bars, such as "dual chunk attention, 2 of 3"."""
    total = len(extensions)
    return [f"{method_words(e.method)}, {i} of {total}" for i, e in enumerate(extensions, 1)]
