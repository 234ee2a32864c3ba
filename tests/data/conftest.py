"""Fixtures for the tests of the data: a small text corpus, and data modules on it."""

import random

import pytest

from lctrain.data import PackedDataModule, TextSource


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with 60 text files of 20 to 400 words."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota"]
    for number in range(60):
        length = int(chance.lognormvariate(4, 0.8)) + 20
        text = " ".join(chance.choice(words) for _ in range(length))
        (folder / f"{number:02}.txt").write_text(f"{number}: {text}\n")
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """One cache folder for all tests, since most of them tokenize the same corpus."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_data(corpus, cache_dir):
    """Returns a factory of data modules on the corpus: make_data(**settings)."""

    def make(**overrides) -> PackedDataModule:
        settings = {
            "source": TextSource(files=(f"{corpus}/*.txt",)),
            "max_tokens": 256,
            "vocab_size": 300,
            "cache_dir": cache_dir,
        } | overrides
        return PackedDataModule(**settings)

    return make
