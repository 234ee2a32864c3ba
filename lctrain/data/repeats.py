"""Lists of words that repeat to the end of a document: the quickest way to learn to copy.

To find a passkey a model must copy what followed an earlier occurrence of a token. Short lists
teach that step by step: with two words the next one is the other one, with a few it is one of them.
"""

from __future__ import annotations

import numpy as np

from lctrain.data.passkey import PasskeyFormat

SHORTEST_LIST = 2  # words
LONGEST_LIST = 24


def make_repeats(format: PasskeyFormat, random: np.random.Generator, tokens: int) -> np.ndarray:
    """Makes a document of one list of different words, over and over.

    Args:
        format: Its words are those of passkeys.
        random: Chooses the words; the length of the list is log-uniform.
        tokens: Of the document, begin and end token included.

    Returns:
        [tokens] int64.
    """
    room = tokens - len(format.begin) - len(format.end)
    longest = max(SHORTEST_LIST, min(LONGEST_LIST, len(format.words), room // 2))
    words = round(SHORTEST_LIST * (longest / SHORTEST_LIST) ** random.random())
    chosen = random.permutation(len(format.words))[:words]
    text = np.resize(np.concatenate([format.words[word] for word in chosen]), max(room, 0))
    return np.concatenate([format.begin, text, format.end])[:tokens]
