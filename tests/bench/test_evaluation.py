"""Tests lctrain-bench evaluation on a CPU: its record, a failed run, and the time limit."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from lctrain.bench import evaluation, evaluation_runs
from lctrain.bench.__main__ import main
from tests.numerics import near


@pytest.fixture
def record(tmp_path):
    """Returns record(*options): the record of a trial, and its exit status."""

    def run(*options):
        output = tmp_path / "evaluation.json"
        status = main(["evaluation", "--tiny", "--output", str(output), *options])
        return json.loads(output.read_text()), status

    return run


def test_a_trial_measures_perplexity_and_answers(record, capsys):
    found, status = record("--parts", "perplexity,answers")
    assert status == 0
    rows = found["perplexity"]
    assert [(row["length"], row["documents"], row["tokens"]) for row in rows] == [
        (256, 3, 768),
        (512, 2, 1024),
    ]
    for row in rows:
        assert row["speed_ratio"] == near(row["forward_seconds"] / row["seconds"])
    passkey, ruler = found["answers"]
    assert (passkey["prompts"], ruler["prompts"]) == (5, 1)
    for row in found["answers"]:
        assert row["time_ratio"] == near(row["seconds"] / row["prefill_seconds"])
    assert found["suite"] == []
    assert "| `ruler` | 512 | 1 |" in capsys.readouterr().out


def test_a_small_model_answers_by_generation_at_several_lengths(record, capsys):
    found, status = record("--parts", "generated")
    assert status == 0
    (row,) = found["generated"]
    assert (row["task"], row["prompts"]) == ("passkey by generation", 12)
    assert (row["shortest"], row["length"]) == (256, 512)
    assert row["time_ratio"] == near(row["seconds"] / row["prefill_seconds"])
    assert "| `passkey by generation` | 256 to 512 | 12 |" in capsys.readouterr().out


def test_a_long_document_is_one_window(record, capsys):
    found, status = record("--parts", "document")
    assert status == 0
    (row,) = found["document"]
    assert row["tokens"] == 2048
    assert round(row["loss"]) == round(math.log(8192))  # of random weights
    assert "| 2,048 | " in capsys.readouterr().out


def test_a_part_of_the_suite_is_named(record):
    sizes = ("--rounds", "1", "--suite-documents", "1", "--suite-items", "2")
    found, status = record("--parts", "suite", "--seconds", "400", *sizes)
    assert status == 0
    assert [(row["documents"], row["items"]) for row in found["suite"]] == [(1, 2)] * 3


def test_the_suite_runs_every_task_of_a_stored_model(record):
    found, status = record("--parts", "suite")
    assert status == 0
    tasks = ["passkey", "ruler", "perplexity"]
    assert [row["task"] for row in found["suite"]] == tasks
    assert all(row["seconds"] > 0 for row in found["suite"])


def test_a_failed_run_leaves_the_others_their_turn(record, monkeypatch):
    def fails(model, length, sizes):
        if length == 256:
            raise RuntimeError("no memory")
        return {"documents": 1, "tokens": 512, "seconds": 1.0, "speed_ratio": 0.5}

    monkeypatch.setattr(evaluation, "time_perplexity", fails)
    found, status = record("--parts", "perplexity")
    assert status == 1
    first, second = found["perplexity"]
    assert first["error"] == "RuntimeError: no memory"
    assert second["speed_ratio"] == 0.5


def test_no_run_begins_after_the_limit(record, monkeypatch):
    clock = SimpleNamespace(perf_counter=iter(range(0, 10**6, 100)).__next__)
    monkeypatch.setattr(evaluation, "time", clock)
    found, status = record("--parts", "suite", "--seconds", "1")
    assert status == 0
    assert all("not run after" in row["error"] for row in found["suite"])


def test_documents_of_a_long_context_are_fewer():
    sizes = evaluation_runs.Sizes(most_tokens=2**21)
    counts = [sizes.documents_of(length) for length in sizes.lengths]
    assert counts == [64, 64, 64, 64, 32, 16]
    assert {evaluation_runs.Sizes().documents_of(length) for length in sizes.lengths} == {64}
    assert evaluation_runs.Sizes(most_tokens=9).documents_of(4096) == 1


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["evaluation"]) == 2
    assert "lctrain-bench evaluation needs a GPU" in capsys.readouterr().err
