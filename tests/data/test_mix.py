"""Tests mixes of sources: shares, epochs, limits, labels, held-out sets, reports and errors."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import DatasetDict

from lctrain.data import (
    ChatSource,
    PackedDataModule,
    SourceMix,
    SourcePart,
    TextSource,
    TokenizedDocument,
)
from lctrain.data.dataset import DatasetTokens
from lctrain.data.mixed_rows import MixedPart, mix_rows, repeats_of
from lctrain.eval.documents import evaluation_documents
from tests.numerics import near


def store(count, length, first):
    """Documents whose tokens are all their own number."""
    return DatasetTokens([[first + number] * length for number in range(count)])


def mixed(*parts, **settings):
    defaults = {"max_tokens": 64, "max_document_tokens": None, "window": 1000, "seed": 0}
    return mix_rows(parts, **(defaults | settings))


def documents_of(rows):
    """Returns the number that every document of the rows consists of, in the order of the plan."""
    plan = rows.plan
    return [int(rows.store.tokens(document)[0]) for document in plan.documents]


def test_weights_are_shares_and_epochs_are_limits():
    assert repeats_of([100, 300], [1.0, 2.5], None) == [1.0, 2.5]
    assert repeats_of([100, 300], [1.0, 1.0], [1, 1]) == [1.0, near(1 / 3)]
    assert repeats_of([100, 300], [2.0, 1.0], [1, 1]) == [2.0, near(2 / 3)]
    assert repeats_of([100, 300], [4.0, 1.0], [1, 1]) == [3.0, 1.0]


def test_the_rows_hold_the_shares_of_the_weights():
    rows = mixed(
        MixedPart("a", store(40, 10, 100), "split", epochs=3, weight=3),
        MixedPart("b", store(200, 10, 1000), "split", weight=1),
    )
    found = documents_of(rows)
    assert sorted(n for n in found if n < 1000) == sorted([*range(100, 140)] * 3)
    chosen = [n for n in found if n >= 1000]
    assert len(chosen) == len(set(chosen)) == 40
    a, b = rows.report.sources
    assert (a.tokens, a.repeats, b.tokens, b.repeats) == (1200, 3.0, 400, near(0.2))
    assert a.fill + b.fill == near(rows.report.fill)
    assert "a: 1,200 tokens of 120 documents, fill" in str(rows.report)
    half = len(found) // 2  # both halves of the order hold both sources
    assert abs(sum(n < 1000 for n in found[:half]) - 60) <= 1
    assert documents_of(mixed(
        MixedPart("a", store(40, 10, 100), "split", epochs=3, weight=3),
        MixedPart("b", store(200, 10, 1000), "split", weight=1),
    )) == found  # fmt: skip


def test_a_fraction_of_an_epoch_is_nearest_in_tokens_and_never_empty():
    rows = mixed(MixedPart("a", store(9, 10, 0), "split", epochs=2.4))
    counts = np.bincount(documents_of(rows))
    assert set(counts) == {2, 3}
    assert counts.sum() == 22
    tiny = mixed(MixedPart("a", store(9, 10, 0), "split", epochs=0.01))
    assert len(documents_of(tiny)) == 1
    assert "a: 10 tokens of 1 document, fill" in str(tiny.report)
    with pytest.raises(ValueError, match="at most 1,000,000,000 documents, got 9,000,000,000,000"):
        mixed(MixedPart("a", store(9, 10, 0), "split", epochs=1e12))
    other = mixed(MixedPart("a", store(9, 10, 0), "split", epochs=2.4), seed=1)
    assert sorted(documents_of(other)) != sorted(documents_of(rows))


def test_every_source_treats_long_documents_in_its_own_way():
    rows = mixed(
        MixedPart("split", store(2, 40, 0), "split"),
        MixedPart("cut", store(3, 40, 10), "truncate"),
        MixedPart("drop", DatasetTokens([[20] * 40, [21] * 5]), "drop"),
        max_document_tokens=16,
    )
    report = rows.report
    assert (report.split, report.truncated, report.truncated_tokens) == (2, 3, 3 * 24)
    assert (report.dropped, report.dropped_tokens) == (1, 40)
    assert [part.tokens for part in report.sources] == [80, 48, 5]
    assert sorted(documents_of(rows)) == [0, 0, 0, 1, 1, 1, 10, 11, 12, 21]


@pytest.fixture
def sources(tokenizer, tmp_path):
    """Texts, conversations, and the tokenizer of both."""
    lines = [json.dumps({"prompt": f"{i}?", "completion": f"It is {i}."}) for i in range(30)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(f"{number} is a number that I like. " * 5)
    chats = ChatSource(files=tmp_path / "chats.jsonl")
    return SimpleNamespace(texts=TextSource(files=f"{tmp_path}/*.txt"), chats=chats)


@pytest.fixture(scope="session")
def tokenizer():
    from tests.data.chat.conftest import make_tokenizer

    return make_tokenizer("chatml")


def make(sources, tokenizer, tmp_path, **settings):
    mix = SourceMix(
        sources=[
            SourcePart(source=sources.texts, name="books", weight=1, epochs=2),
            SourcePart(source=sources.chats, weight=3, epochs=2),
        ]
    )
    defaults = {"max_tokens": 128, "held_out_fraction": 0.2, "cache_dir": tmp_path / "cache"}
    data = PackedDataModule(mix, tokenizer, **(defaults | settings))
    data.setup()
    return data


def labels_by_name(rows):
    """Returns the labels of every document in the rows."""
    found = {}
    for row in range(len(rows)):
        batch = rows[row]
        bounds = zip(batch.cu_seqlens.tolist(), batch.cu_seqlens[1:].tolist(), strict=False)
        for name, (first, stop) in zip(batch.names, bounds, strict=True):
            found[name] = batch.labels[0, first:stop].tolist()
    return found


def test_texts_and_conversations_share_rows_and_keep_their_labels(sources, tokenizer, tmp_path):
    data = make(sources, tokenizer, tmp_path)
    books, chats = data.packing_report.sources
    longest = max(batch.max_seqlen for batch in map(data._prepared.train_rows.__getitem__, [0, 1]))
    assert abs(chats.tokens - 3 * books.tokens) <= 3 * longest  # half a document of either
    assert books.trained_tokens is None
    assert 0 < chats.trained_tokens < chats.tokens
    rows = data._prepared.train_rows
    trained = {"txt": set(), "jsonl": set()}
    shared = 0
    for row in range(len(rows)):
        batch = rows[row]
        kinds = set()
        for number, name in enumerate(batch.names):
            kind = name.split(":")[0].rpartition(".")[2].split("[")[0]
            kinds.add(kind)
            first, stop = batch.cu_seqlens[number : number + 2].tolist()
            trained[kind].add(bool((batch.labels[0, first : stop - 1] >= 0).all()))
        shared += len(kinds) == 2
    assert trained == {"txt": {True}, "jsonl": {False}}
    assert shared > 0
    alone = PackedDataModule(
        sources.chats, tokenizer, max_tokens=128, held_out_fraction=0.2, overlong="truncate",
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    alone.setup()
    masks = [labels_by_name(module._prepared.train_rows) for module in (alone, data)]
    common = masks[0].keys() & masks[1].keys()
    assert len(common) > 10
    assert all(masks[0][name] == masks[1][name] for name in common)


def test_every_source_holds_out_what_it_would_hold_out_alone(sources, tokenizer, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x.txt").write_text("A text that nothing else holds.")
    extra = {"more": {"kind": "text", "files": [f"{tmp_path}/more/x.txt"]}}
    data = make(sources, tokenizer, tmp_path, held_out=extra)
    assert data.held_out_names == ["books", "chat", "more"]
    assert len(data.val_dataloader()) == 3
    alone = PackedDataModule(
        sources.texts, tokenizer, max_tokens=128, held_out_fraction=0.2,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    alone.setup()
    assert data.held_out_reports["books"] == alone.held_out_report
    assert data.held_out_report.tokens == sum(r.tokens for r in data.held_out_reports.values())
    names = [document.name for document in data.held_out_documents()]
    assert names[-1].endswith("x.txt")
    read = evaluation_documents(data.preparation, "held_out")
    assert isinstance(read[0], TokenizedDocument)
    assert [document.name for document in read] == names
    assert len(evaluation_documents(data.preparation, "all")) == 50


@pytest.mark.parametrize("own_files", [True, False])
def test_held_out_documents_that_another_source_trains_on_are_counted(own_files, tmp_path, caplog):
    """They come from held_out_files, or from the split of a source with two documents."""
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_text(f"{number} is a number that I like. " * 5)
    small = {"kind": "text", "name": "small", "files": [f"{tmp_path}/1[01].txt"]}
    if own_files:
        small["held_out_files"] = [f"{tmp_path}/0[2-4].txt"]
    large = {"kind": "text", "name": "large", "files": [f"{tmp_path}/*.txt"]}
    PackedDataModule(
        SourceMix(sources=[small, large]), max_tokens=64, vocab_size=300, held_out_fraction=0.001,
        cache_dir=tmp_path / "cache",
    ).setup()  # fmt: skip
    found = [text for text in caplog.messages if "in the training data, too" in text]
    assert any(text.startswith("The held-out set small, in other sources: ") for text in found)


def test_a_step_has_the_same_rows_on_any_number_of_ranks(sources, tokenizer, tmp_path):
    orders = []
    for ranks, accumulated in ((1, 4), (2, 2), (4, 1)):
        data = make(sources, tokenizer, tmp_path)
        data.trainer = SimpleNamespace(
            world_size=ranks, global_rank=0, accumulate_grad_batches=accumulated,
            state=SimpleNamespace(fn=None),
        )  # fmt: skip
        orders.append([set(step.ravel().tolist()) for step in
                       data._order.rows(1).reshape(-1, 4)])  # fmt: skip
        assert data.settings["packs_per_step"] == 4
    assert orders[0] == orders[1] == orders[2]


def test_a_resumed_run_must_have_the_same_mix(sources, tokenizer, tmp_path):
    data = make(sources, tokenizer, tmp_path)
    state = data.state_dict()
    other = PackedDataModule(
        SourceMix(sources=[SourcePart(source=sources.texts, epochs=2),
                           SourcePart(source=sources.chats)]),
        tokenizer, max_tokens=128, held_out_fraction=0.2, cache_dir=tmp_path / "cache",
    )  # fmt: skip
    other.setup()
    with pytest.raises(ValueError, match="got others: sources was"):
        other.load_state_dict(state)


def test_a_tokenizer_is_trained_on_all_sources(tmp_path):
    for name, letter in (("a", "q"), ("b", "z")):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{letter * 9} {i}" for i in range(90)))
    mix = SourceMix(sources=[{"kind": "text", "files": f"{tmp_path}/{n}.txt"} for n in "ab"])
    data = PackedDataModule(mix, max_tokens=64, vocab_size=300, cache_dir=tmp_path / "cache")
    data.setup()
    assert data.held_out_names == ["text_0", "text_1"]
    assert len(data.tokenizer("qqqqqqqqq zzzzzzzzz")["input_ids"]) < 8


def test_named_sets_of_token_ids_and_texts(tmp_path):
    ids = [[1, 2, 3, 4]] * 8
    sets = DatasetDict({"code": ids[:2], "news": ids[:3]})
    data = PackedDataModule(ids, held_out=sets, max_tokens=16, held_out_fraction=0.0)
    data.setup()
    assert data.held_out_names == ["code", "news"]
    texts = PackedDataModule(
        ["one text", "another text"] * 9, held_out={"code": ["x = 1"]}, max_tokens=16,
        vocab_size=260, cache_dir=tmp_path,
    )  # fmt: skip
    texts.setup()
    assert texts.held_out_names == ["data", "code"]
    with pytest.raises(ValueError, match="held_out must not name a set 'data'"):
        PackedDataModule(ids, held_out={"data": ids}, max_tokens=16)
    with pytest.raises(ValueError, match=r"held_out\['x'\]: a document must have 'input_ids'"):
        PackedDataModule(ids, held_out={"x": [{"y": 1}]}, max_tokens=16).setup()


FAULTS = {
    "none": ([], "sources must list at least one source, got"),
    "text": (["books"], r"sources\[0\]: a source must be a mapping with kind, got 'books'"),
    "kind": ([{"kind": "txt"}], "kind must be one of stdlib, packages, text, .* got 'txt'"),
    "key": ([{"kind": "text", "file": "a"}], "the keys of a text source .* got 'file'. Check"),
    "type": (
        [{"kind": "stdlib", "max_documents": "ten"}],
        r"sources\[0\]: max_documents must be an integer, got 'ten'",
    ),
    "value": (
        [{"kind": "stdlib", "max_documents": 0}],
        r"sources\[0\]: .*max_documents must be at",
    ),
    "weight": ([{"kind": "stdlib", "weight": 0}], "weight must be a number above 0, got 0"),
    "boolean": ([{"kind": "stdlib", "weight": True}], "weight must be a number above 0, got True"),
    "nan": ([{"kind": "stdlib", "weight": math.nan}], "weight must be a number above 0, got nan"),
    "epochs": ([{"kind": "stdlib", "epochs": "x"}], "epochs must be a number above 0, got 'x'"),
    "some": (
        [{"kind": "stdlib", "weight": 1}, {"kind": "packages"}],
        "sources must all have a weight or none, got 1 of 2",
    ),
    "overlong": ([{"kind": "stdlib", "overlong": "cut"}], "overlong must be one of split"),
    "name": ([{"kind": "stdlib", "name": "a/b"}], "name must consist of letters"),
    "names": (
        [{"kind": "stdlib", "name": "a"}, {"kind": "packages", "name": "a"}],
        "sources must have different names, got a, a",
    ),
    "endless": (
        [{"kind": "hub", "dataset": "a/b", "streaming": True}],
        "max_documents or max_bytes must be set for the stream",
    ),
    "source": ([SimpleNamespace()], "a source must be a mapping with kind"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_mixes(fault):
    given, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        SourceMix(sources=given)


def test_faults_that_the_data_module_finds(sources, tokenizer, tmp_path):
    mix = SourceMix(sources=[SourcePart(source=sources.texts, name="books")])
    with pytest.raises(ValueError, match="passkey_fraction must be 0 for a mix of sources"):
        PackedDataModule(mix, tokenizer, passkey_fraction=0.1)
    with pytest.raises(ValueError, match="held_out_sets must have other names than the sources"):
        PackedDataModule(mix, tokenizer, held_out={"books": sources.texts})
    with pytest.raises(ValueError, match="held_out must come with a dataset, got it with a Source"):
        PackedDataModule(mix, tokenizer, held_out=["a text"])
    chats = SourceMix(sources=[SourcePart(source=sources.chats)])
    with pytest.raises(
        ValueError, match=r"sources\[0\]: tokenizer must be given for conversations"
    ):
        PackedDataModule(chats)
    long = SourceMix(sources=[SourcePart(source=sources.texts, overlong="drop")])
    data = PackedDataModule(long, tokenizer, max_tokens=8, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="document that can be used, got none from text"):
        data.setup()
    templates = []
    for name in "ab":
        (tmp_path / f"{name}.jinja").write_text(name)
        templates.append(
            SourcePart(
                source=ChatSource(
                    files=sources.chats.files, chat_template=tmp_path / f"{name}.jinja"
                )
            )
        )
    with pytest.raises(ValueError, match="sources must share one chat_template, got several"):
        SourceMix(sources=templates)
    with pytest.raises(ValueError, match="share one chat_template, got it in 1 of 2 chat sources"):
        SourceMix(sources=[templates[0], SourcePart(source=sources.chats, name="other")])
