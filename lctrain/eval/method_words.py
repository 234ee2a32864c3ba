"""Names of the methods of reading beyond the window, for pictures and progress bars."""

from __future__ import annotations

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
