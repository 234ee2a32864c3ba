"""Tests lctrain-eval with several methods that read beyond the window, and with passkeys."""

import csv
import json

import pytest

import lctrain.models
from lctrain.config import AttentionConfig, NeedleConfig, RulerConfig
from lctrain.evaluate import evaluate


def test_command_line_compares_methods_and_finds_passkeys(
    run_main, small_window_folder, tmp_path, capsys
) -> None:
    run_main(
        f"model={small_window_folder}",
        "split=all",
        "name=mine",
        "methods=[plain,linear,ntk,yarn,dual_chunk]",
        "lengths=[16,64]",
        "tasks=[perplexity,passkey]",
        "passkey.lengths=[160,256]",
        "passkey.methods=[plain,intra_chunk]",
        "passkey.depths=[0,1]",
        "passkey.keys_per_cell=2",
    )
    (folder,) = (tmp_path / "outputs" / "mine").iterdir()
    content = json.loads((folder / "perplexity_by_method.json").read_text())
    assert content["window"] == 16
    assert [(row["method"], row["length"]) for row in content["rows"]] == [
        (method, length)
        for method in ("plain", "linear", "ntk", "yarn", "dual_chunk")
        for length in (16, 64)
    ]
    passkeys = json.loads((folder / "passkey_retrieval.json").read_text())
    assert {row["method"] for row in passkeys["rows"]} == {"plain", "intra_chunk"}
    assert {row["length"] for row in passkeys["rows"]} == {160, 256}
    with (folder / "metrics.csv").open() as file:
        metrics = next(csv.DictReader(file))
    assert float(metrics["perplexity_yarn_64"]) == content["rows"][7]["perplexity"]
    assert float(metrics["passkey_plain_256"]) == 0.0
    printed = capsys.readouterr().out
    assert "Perplexity by context length and method" in printed
    assert "Passkeys found by" in printed
    for name in ("perplexity_by_method.png", "passkey_retrieval.png"):
        assert str(folder / name) in printed


def test_the_attention_options_are_those_of_the_methods(make_config, small_window_folder) -> None:
    dual_chunk = AttentionConfig(name="dual_chunk", chunk_size=7, local_size=1)
    settings = {"methods": ["plain", "dual_chunk"], "lengths": [16, 64], "attention": dual_chunk}
    narrow = evaluate(make_config(small_window_folder, **settings)).perplexity
    settings["attention"] = None
    wide = evaluate(make_config(small_window_folder, **settings)).perplexity
    losses = [
        {name: [row.loss for row in table.rows] for name, table in comparison.tables.items()}
        for comparison in (narrow, wide)
    ]
    assert losses[0]["plain"] == losses[1]["plain"]
    assert losses[0]["dual_chunk"] != losses[1]["dual_chunk"]


def test_a_window_of_ones_own(make_config, small_window_folder) -> None:
    settings = {"methods": ["linear"], "lengths": [16, 64]}
    comparison = evaluate(make_config(small_window_folder, window=64, **settings)).perplexity
    assert comparison.window == 64
    plain = evaluate(make_config(small_window_folder, **settings | {"methods": ["plain"]}))
    rows = zip(comparison.tables["linear"].rows, plain.perplexity.tables["plain"].rows, strict=True)
    assert all(ours.loss == theirs.loss for ours, theirs in rows)


@pytest.mark.parametrize(
    ("window", "options", "expected"),
    [(None, {}, 16), (64, {}, 64), (64, {"window": 32}, 32)],
    ids=["config", "evaluation", "attention"],
)
def test_the_window_of_dual_chunk_attention_without_methods(
    make_config, small_window_folder, monkeypatch, window, options, expected
) -> None:
    patched = []

    def patch_model(model, **options):
        handle = lctrain.models.patch.patch_model(model, **options)
        patched.append(handle.spec)
        return handle

    monkeypatch.setattr(lctrain.models, "patch_model", patch_model)
    attention = AttentionConfig(name="dual_chunk", **options)
    evaluate(make_config(small_window_folder, attention=attention, window=window, lengths=[8]))
    assert [(spec.window, spec.chunk_size) for spec in patched] == [(expected, expected - 1)]


@pytest.mark.parametrize("attention", [None, AttentionConfig(name="dual_chunk")])
def test_passkeys_of_the_model_as_it_is(make_config, small_window_folder, attention) -> None:
    evaluation = evaluate(
        make_config(small_window_folder, tasks=["passkey"], lengths=[200], attention=attention)
    )
    assert evaluation.perplexity is None
    assert list(evaluation.passkey.found) == ["plain" if attention is None else "dual_chunk"]
    assert set(evaluation.paths) == {"passkey csv", "passkey json", "passkey png", "report"}


@pytest.mark.parametrize("by", ["generation", "likelihood"])
def test_needles_and_ruler_with_a_tokenizer_of_transformers(make_config, by) -> None:
    config = make_config(
        tasks=["needle", "ruler"],
        lengths=[900],
        needle=NeedleConfig(depths=[0.5], needles=1, by=by),
        ruler=RulerConfig(tasks=["niah_single_1", "niah_multikey_2"], items=1, by=by),
    )
    evaluation = evaluate(config)
    assert list(evaluation.tables) == ["needle", "ruler"]
    rows = evaluation.tables["ruler"].as_dicts()
    assert [(row["task"], row["score"]) for row in rows] == [
        ("niah_single_1", 0.0),
        ("niah_multikey_2", 0.0),
    ]
    assert all(path.exists() for path in evaluation.paths.values())
