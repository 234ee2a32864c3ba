"""Tests tokenizing long texts in pieces: the same tokens as the whole text, in bounded memory."""

import json
import random
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from lctrain.data import long_text
from lctrain.data.documents import read_documents
from lctrain.data.long_text import encode_long
from lctrain.data.tokenizing import tokenize

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = "<|endoftext|>"


def source_text() -> str:
    """Sixty thousand characters of code, with character sequences that are hard to tokenize."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = (root / "argparse.py").read_text()[:40_000]
    chance = random.Random(0)
    strange = [
        "漢字かな交じり文",
        "naïve café",
        "e\u0301",
        "  \n\n\t ",
        "1234567",
        "😀👩‍👩‍👧",
        "မြန်မာ",
    ]
    strange += [SPECIAL, " ", "\r\n", "...", "don't", "x" * 300, "<|im", "\u00a0"]
    return text[:20_000] + "".join(chance.choices(strange, k=1500)) + text[20_000:]


TEXT = source_text()


def gpt2() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=[SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def llama3() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CL100K), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=[SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def llama2() -> Tokenizer:
    """Returns a BPE tokenizer like Llama 2's: a normalizer, no pre-tokenizer, and byte fallback."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    learnt.train_from_iterator([TEXT[:20_000]], trainer)
    parts = json.loads(learnt.to_str())["model"]
    merges = [tuple(m) for m in parts["merges"]]
    tokenizer = Tokenizer(
        models.BPE(parts["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Replace("▁", " ")
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<unk>", SPECIAL], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=["[UNK]", SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@pytest.fixture(scope="module", params=[gpt2, llama3, llama2, unigram, wordpiece])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=request.param(), eos_token=SPECIAL)


def whole(tokenizer, text: str, split: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]


@pytest.mark.parametrize("split", [True, False])
def test_pieces_give_the_tokens_of_the_whole(tokenizer, split, monkeypatch):
    expected = whole(tokenizer, TEXT, split)
    pieces = []
    windows = long_text._windows

    def counted(*arguments):
        for piece in windows(*arguments):
            pieces.append(len(piece))
            yield piece

    monkeypatch.setattr(long_text, "_windows", counted)
    for size in (3001, 4096, 7777):
        pieces.clear()
        ids = encode_long(tokenizer, TEXT, split_special_tokens=split, piece=size)
        assert ids.tolist() == expected
        assert len(pieces) > 5
    short = TEXT[:100]
    ids = encode_long(tokenizer, short, split_special_tokens=split, piece=200)
    assert ids.tolist() == whole(tokenizer, short, split)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 20_000,
        " " * 20_000,
        "\n" * 20_000,
        "ab " * 9000,
        "",
        "😀" * 5000,
        TEXT[:9000].replace("\n", ""),
    ],
    ids=["letters", "spaces", "lines", "words", "empty", "emoji", "one-line"],
)
def test_texts_without_a_border_are_the_same_too(tokenizer, text):
    ids = encode_long(tokenizer, text, split_special_tokens=True, piece=2048)
    assert ids.tolist() == whole(tokenizer, text, True)


def test_a_tokenizer_in_python_is_cut_at_line_breaks():
    tokenizer = ByT5Tokenizer()
    seen = []
    ids = encode_long(
        tokenizer, TEXT, split_special_tokens=True, piece=5000, progress=lambda n: seen.append(n)
    )
    assert ids.tolist() == whole(tokenizer, TEXT, True)
    assert sum(seen) == len(TEXT)
    assert max(seen) < 20_000


def test_progress_adds_up(tokenizer):
    seen = []
    encode_long(
        tokenizer, TEXT, split_special_tokens=True, piece=4096, progress=lambda n: seen.append(n)
    )
    assert sum(seen) == len(TEXT)
    assert len(seen) > 10


def test_a_long_document_is_tokenized_in_bounded_parts(tmp_path, monkeypatch, capsys):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gpt2(), eos_token=SPECIAL)
    monkeypatch.setattr("lctrain.data.tokenizing.PIECE", 4096)
    monkeypatch.setattr("lctrain.data.tokenizing._SHOWN", 4096)
    longest = []
    call = type(tokenizer).__call__

    def spied(self, text, *arguments, **options):
        longest.append(max(map(len, [text] if isinstance(text, str) else text)))
        return call(self, text, *arguments, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", spied)
    monkeypatch.setattr(
        "lctrain.data.tokenizing.encode_long",
        lambda *arguments, **options: encode_long(*arguments, **options, piece=4096),
    )
    documents = read_documents(
        Dataset.from_dict({"text": ["short", TEXT], "name": ["s", "book"]}), "t"
    )
    monkeypatch.setattr("lctrain.data.documents.GROUP_BYTES", 4096)
    store = tokenize(documents, tokenizer, tmp_path)
    assert max(longest) <= 8192
    monkeypatch.setattr(type(tokenizer), "__call__", call)
    expected = [*whole(tokenizer, TEXT, True), tokenizer.eos_token_id]
    assert np.array_equal(store.tokens(1), expected)
    assert store.special_texts == len(re.findall(re.escape(SPECIAL), TEXT))
    assert "Tokenizing book" in capsys.readouterr().err
