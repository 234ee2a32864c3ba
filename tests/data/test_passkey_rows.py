"""Tests rows with a share of passkey documents: the share, the lengths and reproducibility."""

import pickle

import numpy as np
import pytest

from lctrain.data.packing import plan_rows
from lctrain.data.passkey import PasskeyFormat
from lctrain.data.passkey_rows import PasskeyStore, _stream, add_passkeys, passkey_lengths

SETTINGS = {"max_tokens": 1024, "max_document_tokens": 300, "passkey_fraction": 0.5}


@pytest.fixture
def data(make_data):
    module = make_data(**SETTINGS)
    module.setup()
    return module


def test_lengths_fill_each_row_and_stay_in_range():
    lengths, row_offsets = passkey_lengths(50, 1000, 64, 400)
    rows = np.split(lengths, row_offsets[1:-1])
    assert len(rows) == 50
    assert all(1000 - 64 < row.sum() <= 1000 for row in rows)
    assert lengths.min() >= 64
    assert lengths.max() <= 400
    assert 0.3 < (lengths < 160).mean() < 0.7  # log-uniform: half are below sqrt(64 * 400)
    assert (passkey_lengths(10, 1000, 64, 400)[0] == lengths[: row_offsets[10]]).all()


def test_passkeys_lie_at_the_end_of_their_rows():
    plan = plan_rows(np.array([5, 4, 3, 3, 2]), 8)
    row_offsets = np.array([0, 1, 1, 3])
    mixed = add_passkeys(plan, 5, np.array([70, 80, 90]), row_offsets, 99)
    for row in range(len(plan)):
        text = plan.row(row)
        assert mixed.row(row)[: len(text)].tolist() == text.tolist()
    passkeys = [mixed.lengths[mixed.row(row)[len(plan.row(row)) :]] for row in range(len(plan))]
    assert np.concatenate(passkeys).tolist() == [70, 80, 90]
    assert mixed.documents[-3:].tolist() == [5, 6, 7]
    assert mixed.report.tokens == 17 + 240
    assert mixed.report.passkeys == 3
    assert "3 with a passkey (240 tokens)" in str(mixed.report)
    assert mixed.costs().sum() == plan.costs().sum() + 70**2 + 80**2 + 90**2


def test_every_row_has_its_share_and_text_in_short_documents(data):
    report = data.packing_report
    assert report.max_tokens == 1024
    rows = data._ready.train_rows
    for row in range(len(rows)):
        batch = rows[row]
        passkeys = [name.startswith("passkey:") for name in batch.names]
        assert batch.num_tokens <= 1024
        assert batch.max_seqlen <= 300
        lengths = batch.cu_seqlens.diff().numpy()
        assert 512 - 80 < lengths[passkeys].sum() <= 512
        assert len(set(batch.document_ids.tolist())) == len(batch.names)
    (held_out,) = data._ready.held_out_rows.values()
    assert not any("passkey" in name for name in held_out.store.names)
    assert data.held_out_report.passkeys == 0


def test_documents_are_passkeys_over_training_text(data):
    format = PasskeyFormat.of(data.tokenizer)
    store = data._ready.train_rows.store
    documents = [n for n, name in enumerate(store.names) if name.startswith("passkey:")]
    keys = set()
    for document in documents:
        ids = store.tokens(document)
        assert len(ids) == store.lengths[document]
        assert ids[-1] == data.tokenizer.eos_token_id
        text = data.tokenizer.decode(ids)
        key = text.rpartition("# The pass key is")[2].removesuffix(data.tokenizer.eos_token)
        assert text.count("# The pass key is" + key) == 2
        keys.add(key)
    assert len(keys) > 0.9 * len(documents)
    assert {len(key.split()) for key in keys} > {4, 5, 6}
    assert min(store.lengths[documents]) >= format.shortest


def test_a_tenth_of_the_keys_stands_at_each_end_of_the_text(data):
    format = PasskeyFormat.of(data.tokenizer)
    joined = data._ready.train_rows.store
    store = PasskeyStore(format, np.full(1000, 300), joined._first)
    statement, asked = format.statement.tolist(), (*format.reminder, *format.question)
    begin, places = len(format.begin), []
    for document in range(len(store)):
        ids = store.tokens(document).tolist()
        first = ids[begin : begin + len(statement)] == statement
        last = any(tuple(ids[at : at + len(asked)]) == asked for at in range(len(ids)))
        places.append((first, last))
    at_beginning, at_end = np.array(places).mean(axis=0)
    assert 0.07 < at_beginning < 0.14  # a few of the others stand there by chance
    assert 0.07 < at_end < 0.14


def test_the_same_rows_in_another_process_and_another_run(make_data, data):
    copied = pickle.loads(pickle.dumps(data._ready.train_rows))
    other = make_data(**SETTINGS)
    other.setup()
    for row in range(len(copied)):
        batch = data._ready.train_rows[row]
        assert batch.input_ids.equal(copied[row].input_ids)
        assert batch.input_ids.equal(other._ready.train_rows[row].input_ids)


def test_no_stream_of_training_is_one_of_the_evaluation():
    """NumPy pads seeds with zeros: [2, 64] equals [2, 64, 0], the evaluation's seed of one key."""

    def states(generators):
        return {generator.bit_generator.state["state"]["state"] for generator in generators}

    training = states(_stream(purpose, number) for purpose in (1, 2) for number in range(200))
    evaluation = states(
        np.random.default_rng([seed, length, key])
        for seed in range(4)
        for length in range(64, 128)
        for key in range(3)
    )
    assert len(training) == 400
    assert not training & evaluation


def test_a_part_of_a_document(data):
    store = data._ready.train_rows.store
    last = len(store) - 1
    assert store.tokens(last, 3, 10).tolist() == store.tokens(last)[3:13].tolist()
    assert store.tokens(0, 3, 10).tolist() == store.tokens(0)[3:13].tolist()


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"passkey_fraction": 0.25}, "passkey_fraction was 0.5, is 0.25"),
        ({"passkey_fraction": 0.0}, "passkey_fraction was 0.5, is None"),
        ({"max_document_tokens": 200}, "max_document_tokens was 300, is 200"),
        ({"max_document_tokens": None}, "max_document_tokens was 300, is None"),
    ],
)
def test_resuming_with_other_settings_is_an_error(make_data, data, settings, changed):
    other = make_data(**(SETTINGS | settings))
    other.setup()
    with pytest.raises(ValueError, match=changed):
        other.load_state_dict(data.state_dict())


def test_no_room_for_a_passkey_is_an_error(make_data):
    with pytest.raises(ValueError, match=r"must leave room for documents of \d+ tokens.*got 51"):
        make_data(max_tokens=1024, passkey_fraction=0.05).setup()
    with pytest.raises(ValueError, match=r"must leave room .* got 50. Raise them"):
        make_data(max_tokens=1024, passkey_fraction=0.5, max_document_tokens=50).setup()
    with pytest.raises(ValueError, match=r"must leave room .* got 0. Raise them"):
        make_data(max_tokens=1024, passkey_fraction=0.0004).setup()


def test_documents_that_do_not_fit_beside_the_passkeys_are_an_error(make_data):
    settings = {"max_tokens": 512, "passkey_fraction": 0.5}
    message = (
        r"max_document_tokens must be at most 256, what passkey_fraction = 0.5 leaves of "
        r"max_tokens = 512 for text, got 257. Lower passkey_fraction, raise max_tokens"
    )
    with pytest.raises(ValueError, match=message):
        make_data(**settings, max_document_tokens=257)
    for limit in (256, None):
        data = make_data(**settings, max_document_tokens=limit)
        data.setup()
        rows = data._ready.train_rows
        text = [name.startswith("passkey:") for name in rows.store.names].index(True)
        assert max(rows.plan.lengths[rows.plan.documents < text]) == 256


@pytest.mark.parametrize("fraction", [0.999, 1 - 1e-9])
def test_no_room_for_text_is_an_error_that_names_the_passkeys(make_data, fraction):
    with pytest.raises(ValueError, match=r"passkey_fraction must leave at least 2 of max_tokens"):
        make_data(max_tokens=1024, passkey_fraction=fraction)
