"""Tests the benchmark of a training step: all contenders agree, and a failure is a result."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lctrain.models import patch_model
from lctrain.recipes.differential import step as subject
from lctrain.recipes.differential.shape import SHAPES, build_step_model
from lctrain.recipes.differential.step import (
    CONTENDERS,
    Contender,
    main,
    make_step,
    measure_step,
    padded_batches,
    random_documents,
    similar_rows,
)
from tests.numerics import assert_equal_in_float64

CPU = torch.device("cpu")
LENGTHS = (3, 40, 17, 16, 1, 2)
TINY = SHAPES["tiny"]


def build(contender):
    return build_step_model(TINY, contender.version, contender.implementation, CPU, torch.float64)


def gradients_one_by_one(contender):
    """Returns the mean loss's gradients of the unpatched model, one document at a time."""
    model = build(contender)
    documents = [torch.from_numpy(d)[None] for d in random_documents(LENGTHS, TINY) if len(d) > 1]
    targets = sum(LENGTHS) - len(LENGTHS)
    for document in documents:
        logits = model(input_ids=document, use_cache=False).logits[0, :-1]
        (cross_entropy(logits, document[0, 1:], reduction="sum") / targets).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.usefixtures("float64_stays_float64")
def test_every_way_computes_the_same_gradients(name):
    contender = CONTENDERS[name]
    expected = gradients_one_by_one(replace(contender, implementation="sdpa"))
    model = build(contender)
    patch = patch_model(model, contender.attention) if contender.attention else nullcontext()
    with patch:
        step, tokens = make_step(contender.inputs, model, random_documents(LENGTHS, TINY))
        step()
        step()  # gradients are those of one step
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    assert_equal_in_float64(found, expected)
    assert tokens >= sum(LENGTHS)


@pytest.mark.parametrize("shape", SHAPES)
def test_models_of_a_shape_have_equal_parameters(shape):
    meta = torch.device("meta")
    counts = [
        sum(
            parameter.numel()
            for parameter in build_step_model(
                SHAPES[shape], version, "sdpa", meta, torch.bfloat16
            ).parameters()
        )
        for version in (0, 1, 2)
    ]
    assert max(counts) < 1.02 * min(counts)


def test_rows_of_similar_length_hold_every_document_and_little_padding():
    documents = random_documents((10, 100, 30, 90, 5), TINY)
    rows = [sorted(map(len, row), reverse=True) for row in similar_rows(documents, 200)]
    assert rows == [[100, 90], [30, 10, 5]]
    assert [len(row) for row in similar_rows(documents, 20)] == [1, 1, 1, 2]


def test_batches_are_padded_to_their_longest():
    documents = random_documents((3, 5, 2, 4, 1), TINY)
    batches = list(padded_batches(documents, CPU))
    assert [tuple(kwargs["input_ids"].shape) for kwargs, _ in batches] == [(3, 5), (2, 4)]
    assert [count for _, count in batches] == [7, 3]
    kwargs, _ = batches[0]
    assert kwargs["attention_mask"].sum(1).tolist() == [3, 5, 2]
    assert (kwargs["labels"] == -100).sum(1).tolist() == [2, 0, 3]


def test_what_fails_is_a_result(monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    monkeypatch.setattr(subject, "build_step_model", fail)
    options = {"checkpointing": False, "steps": 1, "device": CPU}
    result = measure_step(CONTENDERS["v1"], "mix32k", LENGTHS, TINY, **options)
    assert result.status == "out_of_memory"
    assert result.reason == "CUDA out of memory. Tried"
    assert result.tokens == sum(LENGTHS)
    result = measure_step(Contender("x", 0, "flesh"), "mix32k", LENGTHS, TINY, **options)
    assert result.status == "out_of_memory"
    monkeypatch.undo()
    result = measure_step(Contender("x", 0, "flesh"), "mix32k", LENGTHS, TINY, **options)
    assert result.status == "error"
    assert "flesh" in result.reason


def test_it_writes_what_it_measured(tmp_path, capsys):
    out = tmp_path / "deep" / "step.json"
    sizes = ["--shape", "tiny", "--workloads", "mix32k", "--max-length", "12", "--steps", "1"]
    contenders = ["plain", "v1_two_calls", "transformers_rows"]
    main(["--out", str(out), *sizes, "--contenders", ",".join(contenders)])
    content = json.loads(out.read_text())
    assert content["device"]
    assert content["date"].startswith("20")
    assert {"torch", "transformers", "lctrain"} <= content["versions"].keys()
    assert content["settings"]["shape"]["hidden_size"] == 128
    assert [r["contender"] for r in content["results"]] == contenders * 2
    assert [r["checkpointing"] for r in content["results"]] == [False] * 3 + [True] * 3
    assert {r["status"] for r in content["results"]} == {"ok"}
    assert all(r["tokens"] == 12 * 41 and r["step_ms"] > 0 for r in content["results"])
    assert "x the time of plain" in capsys.readouterr().out


def test_tokens_are_the_same_in_every_run():
    again = random_documents(LENGTHS, TINY)
    for one, other in zip(random_documents(LENGTHS, TINY), again, strict=True):
        np.testing.assert_array_equal(one, other)
