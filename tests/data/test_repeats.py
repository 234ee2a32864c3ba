"""Lists of words that repeat: what they hold, their share of the rows, and bad shares."""

import numpy as np
import pytest

from lctrain.config import DataSettings
from lctrain.data.passkey import PasskeyFormat
from lctrain.data.repeats import LONGEST_LIST, make_repeats

SETTINGS = {"max_tokens": 1024, "max_document_tokens": 300, "passkey_fraction": 0.5}


@pytest.fixture
def prepared(make_data):
    """Rows in which half of the retrieval documents are lists."""
    module = make_data(**SETTINGS, repeat_fraction=0.5)
    module.setup()
    return module


def lists_in(words):
    """[(list, words said)] of a text of words: a list ends before a word that is not in it."""
    found = []
    while words:
        period = next((n for n in range(1, len(words)) if words[n] == words[0]), len(words))
        listed, said = words[:period], 0
        while said < len(words) and words[said] == listed[said % period]:
            said += 1
        found.append((listed, said))
        words = words[said:]
    return found


def test_lists_of_different_words_are_said_a_few_times(prepared):
    format = PasskeyFormat.of(prepared.tokenizer)
    known = {tuple(word.tolist()) for word in format.words}
    (width,) = {len(word) for word in known}  # tokens of a word
    lengths = set()
    for seed in range(100):
        ids = make_repeats(format, np.random.default_rng(seed), 64)
        assert len(ids) == 64
        body = ids[len(format.begin) : len(ids) - len(format.end)]
        words = [
            tuple(word) for word in body[: len(body) // width * width].reshape(-1, width).tolist()
        ]
        lists = lists_in(words)
        listed = [word for words, _ in lists for word in words]
        assert set(listed) <= known
        assert len(set(listed)) == len(listed)
        whole = lists[:-1]  # the end of the document may cut the last one
        assert all(said % len(words) == 0 and said // len(words) >= 2 for words, said in whole)
        lengths |= {len(words) for words, _ in whole}
    assert min(lengths) == 2
    assert 4 <= max(lengths) <= min(LONGEST_LIST, len(known) // 2)


@pytest.mark.parametrize("tokens", [2, 3, 4, 5, 64])
def test_any_number_of_tokens(prepared, tokens):
    format = PasskeyFormat.of(prepared.tokenizer)
    assert len(make_repeats(format, np.random.default_rng(0), tokens)) == tokens


def test_their_share_of_the_documents_and_the_rest_are_passkeys(prepared):
    store = prepared._ready.train_rows.store
    made = [n for n, name in enumerate(store.names) if name.startswith("passkey:")]
    texts = [prepared.tokenizer.decode(store.tokens(n)) for n in made]
    keys = sum("pass key is" in text for text in texts)
    assert 0.3 < keys / len(texts) < 0.7
    assert all(len(store.tokens(n)) == store.lengths[n] for n in made)
    assert all((store.tokens(n, 3, 9) == store.tokens(n)[3:12]).all() for n in made[:9])


def test_without_lists_the_documents_are_as_before(make_data):
    """The share draws nothing from a document's random stream if it is 0."""
    plain, none = make_data(**SETTINGS), make_data(**SETTINGS, repeat_fraction=0.0)
    plain.setup()
    none.setup()
    assert plain.settings == none.settings
    assert "repeat_fraction" not in plain.settings
    assert plain._ready.train_rows[0].input_ids.equal(none._ready.train_rows[0].input_ids)


def test_a_resumed_run_must_have_the_same_share(prepared, make_data):
    other = make_data(**SETTINGS, repeat_fraction=0.25)
    other.load_state_dict(prepared.state_dict())
    with pytest.raises(ValueError, match=r"repeat_fraction was 0.5, is 0.25"):
        other.setup()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"passkey_fraction": 0.5, "repeat_fraction": 1.5}, r"must be in \[0, 1\], got 1.5"),
        ({"passkey_fraction": 0.5, "repeat_fraction": -0.1}, r"must be in \[0, 1\], got -0.1"),
        ({"repeat_fraction": 0.5}, r"passkey_fraction must be above 0 with repeat_fraction, got 0"),
    ],
)
def test_bad_shares(settings, message):
    with pytest.raises(ValueError, match=message):
        DataSettings(**settings)
