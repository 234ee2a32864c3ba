"""Tests sliding perplexity, the gain from context and LongPPL on models whose losses are known."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from lctrain.config import EvalConfig, LongPerplexityConfig, PathsConfig, PretrainedModelConfig
from lctrain.data import TokenizedDocument
from lctrain.distributed import ONE_RANK, Topology
from lctrain.eval import Run, Subject, computed, perplexity_by_length
from lctrain.eval.reading import GivenReading
from lctrain.eval.run_task import progress_bar
from lctrain.eval.tasks import sliding
from lctrain.eval.tasks.context_gain import ContextGain
from lctrain.eval.tasks.harness import Harness
from lctrain.eval.tasks.longppl import LongPerplexity
from lctrain.eval.tasks.sliding import SlidingPerplexity
from tests.distributed.threads import run_in_threads
from tests.eval.conftest import VOCABULARY
from tests.eval.test_perplexity import LooksBack
from tests.numerics import near

pytestmark = pytest.mark.filterwarnings("ignore:.*computes all of its logits at once")


def documents_of(*sizes):
    random = np.random.default_rng(0)
    return [
        TokenizedDocument(f"d{n}", random.integers(VOCABULARY, size=size), n)
        for n, size in enumerate(sizes)
    ]


def table_of(task, model, documents, lengths, tokenizer=None):
    subject = Subject(model, tokenizer, documents, name="m")
    run = Run.prepared(task, subject, [GivenReading()], lengths, max_tokens=200)
    return task.table(computed(run))


def papers_loss(model, documents, length, stride, tokens=None):
    """The published loop: windows that move by the stride, mean over windows of mean losses."""
    losses = []
    for document in documents:
        ids = torch.from_numpy(document.input_ids)[: tokens or length]
        previous = 0
        for start in range(0, len(ids), stride):
            stop = min(start + length, len(ids))
            window = ids[start:stop][None]
            labels = window.clone()
            labels[:, : -(stop - previous)] = -100
            with torch.no_grad():
                losses.append(model(input_ids=window, labels=labels).loss.item())
            previous = stop
            if stop == len(ids):
                break
    return float(np.mean(losses))


@pytest.mark.parametrize("tokens", [None, 90])
@pytest.mark.usefixtures("in_float64")
def test_sliding_perplexity_is_that_of_the_published_loop(make_llama, tokens):
    model, documents = make_llama(), documents_of(100, 50, 120)
    nn.init.normal_(model.lm_head.weight)
    task = SlidingPerplexity(stride=7, document_tokens=tokens)
    table = table_of(task, model, documents, (20, 40))
    for row, length in zip(table.as_dicts(), (20, 40), strict=True):
        order = [documents[2], documents[0], documents[1]]
        expected = papers_loss(model, order, length, 7, tokens)
        assert row["loss"] == near(expected)
        assert row["perplexity"] == near(math.exp(expected))
    assert table.stem == "sliding_perplexity"
    assert "Sliding perplexity" in str(table)


def test_ranks_share_all_windows(make_llama, monkeypatch):
    """The sums of two ranks are those of one, and every window is an item on both."""
    model, documents = make_llama(), documents_of(100, 50, 120)
    task = SlidingPerplexity(stride=7, document_tokens=90)
    kept = []
    monkeypatch.setattr(sliding, "summed", lambda sums, ranks: kept.append(sums) or sums)
    monkeypatch.setattr(Topology, "_exchange", lambda ranks, value: [value] * ranks.size)
    for ranks in (ONE_RANK, Topology(rank=0, size=2), Topology(rank=1, size=2)):
        subject = Subject(model, None, documents, name="m")
        run = Run.prepared(task, subject, [GivenReading()], (40,), max_tokens=200, ranks=ranks)
        assert len(computed(run)[""][40].items) == len(kept[0])
    assert (kept[1] + kept[2]).tolist() == near(kept[0].tolist())
    assert Harness.shares_itself


def test_documents_shorter_than_the_length_are_counted_and_never_padded(make_llama, caplog):
    model = make_llama()
    table = table_of(SlidingPerplexity(), model, documents_of(100, 30), (20, 60))
    assert [row["short_documents"] for row in table.as_dicts()] == [0, 1]
    assert "leaves out 1 document of fewer than 60 tokens" in caplog.text
    message = (
        "documents must hold one of at least 120 tokens for sliding_perplexity, got 2 documents"
    )
    with pytest.raises(ValueError, match=message):
        table_of(SlidingPerplexity(), model, documents_of(100, 30), (120,))
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        SlidingPerplexity(stride=0)


def test_the_gain_lies_at_the_distance_that_the_model_looks_back():
    distance = 24
    random = np.random.default_rng(0)
    documents = [
        TokenizedDocument(f"d{n}", np.tile(random.integers(VOCABULARY, size=distance), 12), n)
        for n in range(4)
    ]
    task = ContextGain(min_context=None, by_method=True)
    rows = table_of(task, LooksBack(distance), documents, (8, 16, 48, 96)).as_dicts()
    known = math.log(VOCABULARY) + math.log(0.9 + 0.1 / VOCABULARY)
    assert [row["length"] for row in rows] == [16, 48, 96]
    assert [row["compared_with"] for row in rows] == [8, 16, 48]
    assert [row["gain"] for row in rows] == near([0.0, known, 0.0])
    with pytest.raises(ValueError, match="lengths must name at least two for context_gain"):
        table_of(ContextGain(by_method=True), LooksBack(distance), documents, (16,))


def test_key_tokens_are_those_that_need_the_long_context():
    distance = 24
    ids = np.random.default_rng(0).integers(VOCABULARY, size=96)
    ids[40:60] = ids[40 - distance : 60 - distance]  # twenty tokens repeat what lies 24 back
    documents = [TokenizedDocument("d", ids, 0)]
    task = LongPerplexity(short_context=16, step=4)
    (row,) = table_of(task, LooksBack(distance), documents, (96,)).as_dicts()
    assert row["key_tokens"] == 20
    assert row["longppl"] == near(1 / (0.9 + 0.1 / VOCABULARY))
    with pytest.raises(ValueError, match="documents must hold key tokens at length 96, got none"):
        table_of(LongPerplexity(short_context=32, step=4), LooksBack(distance), documents, (96,))


def test_key_tokens_do_not_depend_on_the_methods(make_llama, tmp_path):
    """With methods, the evaluated model is loaded once more and stays without a method."""
    model = PretrainedModelConfig(name_or_path="m", revision="r")
    config = EvalConfig(
        model=model,
        paths=PathsConfig(output_dir=str(tmp_path)),
        longppl=LongPerplexityConfig(short_context=8, step=4),
        dtype="float16",
    )
    assert LongPerplexity.of(config).evaluator is None
    task = LongPerplexity.of(dataclasses.replace(config, methods=["yarn", "plain"]))
    assert (task.evaluator, task.dtype) == (model, "float16")
    with pytest.raises(ValueError, match=r"longppl.evaluator must be given with methods, got none"):
        LongPerplexity(methods=["yarn"])


def test_key_tokens_are_chosen_anew_by_a_model_in_training():
    distance = 24
    ids = np.random.default_rng(0).integers(VOCABULARY, size=96)
    ids[40:60] = ids[40 - distance : 60 - distance]
    subject = Subject(LooksBack(2), None, [TokenizedDocument("d", ids, 0)])
    task = LongPerplexity(short_context=16, step=4)
    run = Run.prepared(task, subject, [GivenReading()], (96,), max_tokens=200)
    with pytest.raises(ValueError, match="documents must hold key tokens"):
        computed(run)
    run.subject.model.distance = distance  # what training does
    (row,) = task.table(computed(run)).as_dicts()
    assert row["key_tokens"] == 20


@pytest.mark.parametrize("documents", [1, 3, 4])
def test_ranks_share_the_documents_of_longppl(documents):
    """The key tokens are in the first document, so a rank may find none; it still goes on."""
    distance, size = 24, 2
    random = np.random.default_rng(0)
    texts = [random.permutation(VOCABULARY)[:96] for _ in range(documents)]
    texts[0][40:60] = texts[0][40 - distance : 60 - distance]
    given = [TokenizedDocument(f"d{n}", ids, n) for n, ids in enumerate(texts)]
    subject = Subject(LooksBack(distance), None, given)

    def result(ranks):
        task = LongPerplexity(short_context=16, step=4)
        run = Run.prepared(
            task, subject, [GivenReading()], (96,), max_tokens=200, device="cpu", ranks=ranks
        )
        (cell,) = run.cells()
        done = {}
        with progress_bar(0, "token", shown=False) as bar:
            run.compute_cell(cell, done, bar)
        return done[cell]

    shared = run_in_threads(result, size)
    assert shared == [result(Topology())] * size
    assert [item.id for item in shared[0].items] == ["0 d0"]


def test_settings_and_documents_that_longppl_cannot_use(make_llama):
    model, documents = make_llama(), documents_of(50)
    with pytest.raises(ValueError, match=r"longppl.step must be in \[1, .* = 8\], got 9"):
        LongPerplexity(short_context=8, step=9)
    with pytest.raises(ValueError, match=r"lengths must be above .* = 9, got 9"):
        table_of(LongPerplexity(short_context=8, step=4), model, documents, (9,))
    with pytest.raises(ValueError, match="at least 60 tokens for longppl, got 1 of at most 50"):
        table_of(LongPerplexity(short_context=8, step=4), model, documents, (60,))


def test_the_table_by_length_has_intervals_over_documents(make_llama):
    table = perplexity_by_length(make_llama(), documents_of(40, 50, 60, 70), [8, 64], max_tokens=64)
    for row in table.rows:
        assert row.interval_low < row.perplexity < row.interval_high
    assert [row.short_documents for row in table.rows] == [0, 3]
    assert "95 % intervals of the perplexity, bootstrap over documents: " in str(table)
