"""Tests passkey retrieval on fake models that always find keys, and its refused settings."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lctrain.data.passkey import Filler, PasskeyFormat
from lctrain.eval import METHODS, Extension, answered, passkey_retrieval

WINDOW = 64
LENGTHS = [64, 128]


@pytest.fixture
def format() -> PasskeyFormat:
    """A format with 26 fixed tokens and ten words; every second word has two tokens."""

    def ids(*values: int) -> np.ndarray:
        return np.array(values, dtype=np.int64)

    words = tuple(ids(60 + n) if n % 2 else ids(60 + n, 70 + n) for n in range(10))
    return PasskeyFormat(
        begin=ids(1),
        statement=ids(*range(81, 87)),
        reminder=ids(87, 88),
        question=ids(*range(90, 96), *range(81, 87)),
        words=words,
        end=ids(2),
    )


@pytest.fixture
def documents() -> list[np.ndarray]:
    return [np.r_[1, 3 + np.arange(40) % 50, 2], np.r_[1, 20, 21, 22, 2]]


def run(model, format, documents, methods=("plain",), **options):
    extensions = [Extension(method, WINDOW) for method in methods]
    settings = {"max_tokens": 300, "depths": [0.0, 1.0], "keys_per_cell": 3, "name": "m"} | options
    return passkey_retrieval(model, format, documents, LENGTHS, extensions, **settings)


@pytest.fixture
def looks_up(monkeypatch, format):
    """Replaces greedy predictions by the key, wherever the question's context holds it."""

    def greedy(model, kwargs, places):
        ids = kwargs["input_ids"].flatten()
        if "cu_seq_lens_q" in kwargs:
            bounds = kwargs["cu_seq_lens_q"].tolist()
        else:
            rows, width = kwargs["input_ids"].shape
            bounds = list(range(0, rows * width + 1, width))
        statement = torch.from_numpy(np.r_[format.statement])
        predicted = []
        for place in places.tolist():
            first = max(bound for bound in bounds if bound <= place)
            seen = ids[first : place + 1].tolist()
            prefix = statement.tolist()
            starts = [i for i in range(len(seen)) if seen[i : i + 6] == prefix]
            asked = starts[-1] if starts else 0
            done = len(seen) - asked - 6
            told = starts[0] + 6 + done if len(starts) > 1 else 0
            predicted.append(seen[told])
        return torch.tensor(predicted)

    monkeypatch.setattr(answered, "greedy_tokens", greedy)


@pytest.mark.parametrize("attention", ["packs", "rows"])
def test_a_model_that_looks_keys_up_finds_them_all(
    make_llama, format, documents, looks_up, monkeypatch, attention
):
    if attention == "rows":
        monkeypatch.setattr(answered, "is_patched", lambda model: False)
    table = run(make_llama(), format, documents)
    assert table.found["plain"].tolist() == [[3, 3], [3, 3]]
    assert table.accuracy("plain").tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_intra_chunk_finds_only_keys_of_the_chunk_of_the_question(
    make_llama, format, documents, looks_up
):
    table = run(make_llama(), format, documents, ["plain", "intra_chunk"])
    assert table.found["plain"].tolist() == [[3, 3], [3, 3]]
    assert table.found["intra_chunk"].tolist() == [[3, 3], [0, 3]]


def test_a_random_model_finds_none_and_is_left_as_it_was(make_llama, format, documents):
    model = make_llama(max_position_embeddings=WINDOW)
    ids = torch.arange(90)[None]
    before = model(input_ids=ids).logits
    methods = list(METHODS)
    table = run(model, format, documents, methods)
    assert list(table.found) == methods
    assert all(found.sum() == 0 for found in table.found.values())
    assert model(input_ids=ids).logits.equal(before)


def test_found_is_what_greedy_decoding_finds(make_llama, format, documents, monkeypatch):
    """Compares the found keys with the answers of generate(), token by token."""
    model = make_llama()
    filler = Filler.of(documents, 1)
    made = format.make(np.random.default_rng([0, 64, 0]), 64, 0.0, filler, with_end=False)
    with torch.no_grad():
        prompt = torch.from_numpy(made.input_ids[: made.answer_start])[None]
        greedy = model.generate(
            prompt, max_new_tokens=made.answer_tokens, do_sample=False, eos_token_id=None
        )[0, made.answer_start :]
    answer = SimpleNamespace(
        input_ids=np.r_[made.input_ids[: made.answer_start], greedy.numpy()],
        answer_start=made.answer_start,
        answer_tokens=made.answer_tokens,
    )
    wrong = SimpleNamespace(**vars(answer) | {"input_ids": answer.input_ids.copy()})
    wrong.input_ids[-1] = (wrong.input_ids[-1] + 1) % 97
    device = torch.device("cpu")
    with Extension("plain", WINDOW).patched(model):
        assert answered.answered(model, [wrong, answer], None, device) == [False, True]
    assert answered.answered(model, [answer, wrong], None, device) == [True, False]


def test_keys_depend_on_the_seed_only(format, documents, make_llama, monkeypatch):
    def keys(seed: int, methods=("plain",)) -> list[list[int]]:
        seen = []

        def record(model, made, segment, device):
            seen.extend(one.input_ids.tolist() for one in made)
            return lambda: [False] * len(made)

        monkeypatch.setattr(answered, "launched", record)
        run(make_llama(), format, documents, methods, seed=seed)
        return seen

    first = keys(0)
    assert first == keys(0)
    assert first != keys(1)
    both = keys(0, ("plain", "dual_chunk"))
    assert both == first + first
    assert {len(ids) for ids in first} == set(LENGTHS)
    answers = [ids[-6:] for ids in first[:6]]
    assert answers[:3] == answers[3:]  # at both depths the same keys


def test_a_pass_is_launched_before_the_last_one_is_awaited(
    format, documents, make_llama, monkeypatch
):
    events = []

    def launch(model, made, segment, device):
        number = events.count("launch")
        events.append("launch")

        def wait():
            events.append(number)
            return [True] * len(made)

        return wait

    monkeypatch.setattr(answered, "launched", launch)
    table = run(make_llama(), format, documents, max_tokens=128, depths=[0.0])
    # two texts of 64 tokens in a pass, or one of 128
    assert events == ["launch", "launch", 0, 1, "launch", "launch", 2, "launch", 3, 4]
    assert table.found["plain"].tolist() == [[3], [3]]


def test_files_and_text(format, documents, make_llama, looks_up, tmp_path):
    table = run(make_llama(), format, documents, ["plain", "intra_chunk"])
    paths = table.save(tmp_path / "new")
    with paths["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert rows[-2] == {
        "method": "intra_chunk",
        "length": "128",
        "depth": "0.0",
        "found": "0",
        "keys": "3",
        "accuracy": "0.0",
    }
    content = json.loads(paths["json"].read_text())
    assert (content["window"], content["keys_per_cell"], len(content["rows"])) == (64, 3, 8)
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    text = str(table)
    assert "Passkeys found by m: 3 keys in each cell, window 64" in text
    assert [line.split()[-2:] for line in text.splitlines() if "mean" in line] == [
        ["100%", "100%"],
        ["100%", "50%"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": []}, r"depths must name at least one, got none. Try"),
        ({"depths": [1.5]}, r"depths must be in \[0, 1\], got 1.5"),
        ({"keys_per_cell": 0}, "keys_per_cell must be at least 1, got 0. Try 20"),
        ({"seed": -1}, "passkey seed must be at least 0, got -1"),
        ({"max_tokens": 100}, "lengths must be at most max_tokens = 100, got 128"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_an_error(make_llama, format, documents, options, message):
    with pytest.raises(ValueError, match=message):
        run(make_llama(), format, documents, **options)


def test_a_length_too_short_for_the_prompt_is_an_error(make_llama, format, documents):
    with pytest.raises(ValueError, match=rf"must be at least {format.shortest}, .* got 10. Leave"):
        passkey_retrieval(
            make_llama(), format, documents, [10], [Extension("plain", WINDOW)], max_tokens=100
        )


def test_the_progress_bar_names_the_method(make_llama, format, documents, capsys):
    methods = ("plain", "dual_chunk")
    run(make_llama(), format, documents, methods, keys_per_cell=1, progress=True)
    assert "Passkeys, dual chunk attention, 2 of 2" in capsys.readouterr().err
