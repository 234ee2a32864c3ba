"""Trains the tokenizer of the passkey model: a byte-level BPE that has whole words for keys."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lctrain.data.passkey import QUESTION, REMINDER, STATEMENT
from lctrain.data.tokenizer import END_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY = 1024
COMMONEST = 60  # number of most common words, which occur in most texts and make no good keys
WORDS = 160
REPEATS = 20_000  # more often than any pair of letters in the text, so that these words come first
_WORD = re.compile(r"(?<= )[a-z]{4,7}\b")


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE on texts, on the fixed texts of passkeys and on words for keys.

    The words are common in the texts, without the commonest ones. Each is one token.

    Args:
        texts: Texts to train on.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    counts = Counter(word for text in texts for word in _WORD.findall(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    words = ranked[COMMONEST : COMMONEST + WORDS]
    fixed = STATEMENT + REMINDER + QUESTION + "".join(f" {word}" for word in words)
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([*texts, *[fixed] * REPEATS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=END_TOKEN, clean_up_tokenization_spaces=False
    )
