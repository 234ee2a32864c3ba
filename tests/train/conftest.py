"""Fixtures: a small corpus, and overrides for a training run of seconds."""

import random

import pytest

WORDS = ("def", "return", "class", "self", "None", "for", "in", "while", "yield", "lambda")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Thirty small files of words."""
    folder = tmp_path_factory.mktemp("corpus")
    numbers = random.Random(0)
    for i in range(30):
        words = numbers.choices(WORDS, k=numbers.randrange(20, 400))
        (folder / f"{i}.txt").write_text(f"{i} " + " ".join(words))
    return folder


@pytest.fixture(scope="module")
def tiny(corpus, tmp_path_factory):
    """Overrides for a run of seconds: a tiny model on packs of 128 tokens."""
    return [
        "data=text",
        f"data.files=[{corpus}/*.txt]",
        f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "data.max_tokens=128",
        "data.vocab_size=300",
        "data.held_out_fraction=0.2",
        "model=tiny",
        "trainer.accelerator=cpu",
        "trainer.max_steps=6",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
        "callbacks.checkpoint.every_n_steps=4",
        "evaluation.lengths=[16,64]",
        "evaluation.documents=3",
        "evaluation.document_tokens=200",
    ]
