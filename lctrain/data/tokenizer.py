"""Loads a tokenizer of transformers, or trains a byte-level BPE on the training split."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lctrain.data.documents import Documents

END_TOKEN = "<|endoftext|>"
MASK_TOKEN = "<|mask|>"
_SMALLEST_VOCABULARY = 257  # all bytes and the end token
_PART = 2**20  # characters
_PROBES = 16  # tokens that are tried as a text
_PROBE = " The  cat's\n\n\tna\u00efve caf\u0065\u0301 \U0001f600 1234,56 </s><|endoftext|> END"
_RECIPE = "byte-level-bpe-2"  # raise when training changes, so that old caches are not used


def load_tokenizer(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer of transformers.

    Args:
        name_or_path: Name on the Hugging Face hub, or a folder.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether to run the tokenizer's own code from the hub or the folder.

    Raises:
        ValueError: if no tokenizer can be loaded, or it has no vocabulary. (From a folder without
            tokenizer files, transformers builds a tokenizer of a few special tokens.)
    """
    from transformers import AutoTokenizer

    name_or_path = os.path.expanduser(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ValueError(
            f"tokenizer must be a folder or a name on the Hugging Face hub, got {name_or_path}, "
            f"which cannot be loaded: {error}"
        ) from error
    if len(tokenizer.get_vocab().keys() - tokenizer.added_tokens_encoder.keys()) < 2:
        raise ValueError(
            f"tokenizer must have a vocabulary, got {name_or_path} without one. Check that the "
            "folder holds the files of a tokenizer (tokenizer.json)."
        )
    return tokenizer


def tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns the token ids that a tokenizer adds before every text, and those it adds after."""
    for text in _short_texts(tokenizer):
        with name_unencodable(tokenizer):
            bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            whole = list(tokenizer(text)["input_ids"])
        for begin in range(len(whole) - len(bare) + 1):
            if bare and whole[begin : begin + len(bare)] == bare:
                return whole[:begin], whole[begin + len(bare) :]
    return [], []


def _short_texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yields short texts until one has tokens; a vocabulary may lack the letter a."""
    yield "a"
    ordinary = tokenizer.get_vocab().keys() - tokenizer.added_tokens_encoder.keys()
    yield from sorted(ordinary)[:_PROBES]


def same_ids(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether every token of the smaller vocabulary has the same id in the larger vocabulary."""
    smaller, larger = sorted((first.get_vocab(), second.get_vocab()), key=len)
    return smaller.items() <= larger.items()


@contextmanager
def name_unencodable(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Context manager that turns a tokenizer's error into a ValueError with a remedy."""
    try:
        yield
    except Exception as error:
        if type(error) is Exception:  # what the library raises
            raise ValueError(
                f"tokenizer must encode any text, got {error} from {type(tokenizer).__name__}. "
                "Give its vocabulary an unknown token."
            ) from error
        raise


class DamagedTokenizerError(Exception):
    """Raised if the file of a trained tokenizer in the cache cannot be read."""


def train_tokenizer(
    documents: Documents, vocab_size: int, cache_dir: Path
) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer on the documents, or loads it from the cache.

    Args:
        documents: The training split.
        vocab_size: Size of the vocabulary, the 256 bytes and the end token included.
        cache_dir: Cache folder. The tokenizer is kept in cache_dir/tokenizers, under a hash of the
            texts and the size.

    Raises:
        ValueError: if vocab_size is below 257: the 256 bytes and the end token.
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
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:
        if type(error) is Exception:  # what the tokenizers library raises
            raise DamagedTokenizerError(str(error)) from error
        raise


def train_mask_tokenizer(
    documents: Documents, vocab_size: int, cache_dir: Path
) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of `train_tokenizer` with a mask token, which is its last token.

    Args:
        documents: The training split.
        vocab_size: Size of the vocabulary, the mask token included.
        cache_dir: Cache folder.

    Raises:
        ValueError: if vocab_size is below 258: the 256 bytes, the end token and the mask token.
    """
    if vocab_size <= _SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size must be at least {_SMALLEST_VOCABULARY + 1}, got {vocab_size}. All 256 "
            "bytes, the end token and the mask token need a place."
        )
    tokenizer = train_tokenizer(documents, vocab_size - 1, cache_dir)
    tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    return tokenizer


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of a tokenizer, which changes if a text may become other tokens."""
    parts: list[Any] = [type(tokenizer).__name__, tokenizer.eos_token_id]
    for split in (False, True):  # of a tokenizer written in Python, the output is hashed
        with name_unencodable(tokenizer):
            parts.append(tokenizer(_PROBE, split_special_tokens=split, verbose=False)["input_ids"])
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
        show_progress=sys.stderr.isatty(),
    )
    model.train_from_iterator(_texts(documents), trainer, length=len(documents))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=END_TOKEN, clean_up_tokenization_spaces=False
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.mkdtemp(dir=folder.parent)
    try:
        tokenizer.save_pretrained(unfinished)
        os.rename(unfinished, folder)  # whole or not at all
    except OSError:  # another process was first, with the same result
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _texts(documents: Documents) -> Iterator[list[str]]:
    """Yields lists of texts to train on. Long texts are cut, since training multiplies memory."""
    for group in documents.groups():
        yield [part for text in documents.read(group) for part in _parts(text)]


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PART:
        stop = text.rfind("\n", start, start + _PART) + 1 or start + _PART
        yield text[start:stop]
        start = stop
    yield text[start:]
