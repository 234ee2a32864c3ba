"""What the methods of reading beyond the window are called in pictures."""

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
    """A method in words; its name, if it is another one.

    Args:
        method: As in `lctrain-eval methods=[...]`.
    """
    return _WORDS.get(method, method)
