"""The tokenizer: any of transformers, or a byte-level BPE trained once on the training split."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lctrain.data.documents import Documents

END_TOKEN = "<|endoftext|>"
_SMALLEST_VOCABULARY = 257  # all bytes and the end token
_TEXTS_AT_A_TIME = 64
_RECIPE = "byte-level-bpe-1"  # raise when training changes, so that old caches are not used


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer of transformers.

    Raises:
        ValueError: if it has no end token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    check_end_token(tokenizer, name_or_path)
    return tokenizer


def check_end_token(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises ValueError if the tokenizer cannot mark the end of a document."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer must have an end token, got {name} without one. Every document ends with "
            "it; set tokenizer.eos_token, save the tokenizer, and pass that path."
        )


def train_tokenizer(
    documents: Documents, vocab_size: int, cache_dir: Path
) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE on the documents, or loads it if it was trained on them before.

    Args:
        documents: The training split.
        vocab_size: Number of tokens, the 256 bytes and the end token included.
        cache_dir: It is kept under cache_dir/tokenizers, keyed by the texts and the size.

    Raises:
        ValueError: if vocab_size cannot hold every byte.
    """
    from transformers import PreTrainedTokenizerFast

    if vocab_size < _SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size must be at least {_SMALLEST_VOCABULARY}, got {vocab_size}. All 256 bytes "
            "and the end token need a place."
        )
    key = hashlib.sha256(f"{_RECIPE} {documents.fingerprint} {vocab_size}".encode()).hexdigest()
    folder = cache_dir / "tokenizers" / key[:16]
    if not folder.exists():
        _train(documents, vocab_size, folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of everything that decides which tokens a text becomes."""
    parts: list[Any] = [type(tokenizer).__name__, tokenizer.eos_token_id]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts.append(backend.to_str())
    else:
        parts += [
            sorted(tokenizer.get_vocab().items()),
            sorted(tokenizer.special_tokens_map.items()),
        ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _train(documents: Documents, vocab_size: int, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(_texts(documents), trainer, length=len(documents))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=END_TOKEN, clean_up_tokenization_spaces=False
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.mkdtemp(dir=folder.parent)
    tokenizer.save_pretrained(unfinished)
    try:
        os.rename(unfinished, folder)  # whole or not at all
    except OSError:  # another process was first, with the same result
        shutil.rmtree(unfinished)
        if not folder.exists():
            raise


def _texts(documents: Documents) -> Iterator[list[str]]:
    for batch in documents.texts.iter(batch_size=_TEXTS_AT_A_TIME):
        yield batch["text"]
