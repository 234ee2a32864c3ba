"""Lists of words, each said a few times: the quickest way for a small model to learn to copy.

To find a passkey a model must copy what followed an earlier occurrence of a token. Short lists
teach that step by step: with two words the next one is the other one, with a few it is one of them.
"""

from __future__ import annotations

import numpy as np

from lctrain.data.passkey import PasskeyFormat

SHORTEST_LIST = 2  # words
LONGEST_LIST = 24
FEWEST_TIMES = 2  # that a list is said


def make_repeats(format: PasskeyFormat, random: np.random.Generator, tokens: int) -> np.ndarray:
    """Makes a document of lists that follow one another; no word is in two of them.

    Once all words are used, the last list goes on.

    Args:
        format: Its words are those of passkeys.
        random: Chooses the words, and how long each list is and how often it is said: both are
            log-uniform, up to LONGEST_LIST and to the end of the document.
        tokens: Length of the document, begin and end token included.

    Returns:
        [tokens] int64.
    """
    room = max(0, tokens - len(format.begin) - len(format.end))
    words = [format.words[number] for number in random.permutation(len(format.words))]
    longest = max(SHORTEST_LIST, min(LONGEST_LIST, len(words) // 2))
    parts: list[np.ndarray] = []
    said = first = 0
    while said < room:
        drawn = SHORTEST_LIST * (longest / SHORTEST_LIST) ** random.random()
        listed = np.concatenate(words[first : first + round(drawn)])
        first += round(drawn)
        most = max(FEWEST_TIMES, (room - said) / len(listed))
        times = round(FEWEST_TIMES * (most / FEWEST_TIMES) ** random.random())
        if first + SHORTEST_LIST > len(words):
            times = room // len(listed) + 1
        parts.append(np.tile(listed, times))
        said += len(parts[-1])
    text = np.concatenate([np.empty(0, np.int64), *parts])[:room]
    return np.concatenate([format.begin, text, format.end])[:tokens]
