import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from lctrain import PackedDataModule
from lctrain.config import (
    AttentionConfig,
    LongPerplexityConfig,
    NeedleConfig,
    PretrainedModelConfig,
    RulerConfig,
)
from lctrain.data import TextSource, TokenizedDocument
from lctrain.eval import perplexity_by_length
from lctrain.eval.device import pick_device
from lctrain.eval.documents import evaluation_documents
from lctrain.evaluate import (
    PasskeyConfig,
    evaluate,
    name_the_model,
)
from lctrain.models.pretrained import load_pretrained
from tests.evaluate.conftest import TEXTS
from tests.numerics import near


def direct_table(model_folder: Path, lengths: list[int]):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    documents = [
        TokenizedDocument(
            str(index), tokenizer(text + "<end>", return_tensors="np").input_ids[0], 0
        )
        for index, text in enumerate(TEXTS)
    ]
    return perplexity_by_length(model, documents, lengths, max_tokens=1000)


@pytest.mark.usefixtures("float64_stays_float64")
def test_command_line_evaluates_and_writes(
    run_main, model_folder, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("HOME", str(model_folder.parent))
    run_main(f"model=~/{model_folder.name}", "split=all", "lengths=[8,64]", "name=mine")
    (folder,) = (tmp_path / "outputs" / "mine").iterdir()
    files = {path.name for path in folder.iterdir()}
    assert files >= {
        "config.yaml",
        "metrics.csv",
        "perplexity_by_length.csv",
        "perplexity_by_length.json",
        "perplexity_by_length.png",
    }
    rows = json.loads((folder / "perplexity_by_length.json").read_text())["rows"]
    for row, expected in zip(rows, direct_table(model_folder, [8, 64]).rows, strict=True):
        assert (row["length"], row["tokens"]) == (expected.length, expected.tokens)
        assert row["perplexity"] == near(expected.perplexity)
        assert row["stderr"] == near(expected.stderr)
    with (folder / "metrics.csv").open() as file:
        metrics = next(csv.DictReader(file))
    assert float(metrics["perplexity_64"]) == near(rows[1]["perplexity"])
    assert f"name_or_path: {model_folder}" in (folder / "config.yaml").read_text()
    printed = capsys.readouterr().out
    assert "Perplexity by context length" in printed
    assert str(folder / "perplexity_by_length.png") in printed


@pytest.mark.usefixtures("float64_stays_float64")
def test_patched_and_unpatched_models_agree(make_config) -> None:
    packed = evaluate(make_config()).perplexity
    padded = evaluate(make_config(attention=None)).perplexity
    for row, other in zip(packed.rows, padded.rows, strict=True):
        assert row.loss == near(other.loss)


def test_attention_none_on_the_command_line(run_main, model_folder, capsys) -> None:
    run_main(f"model={model_folder}", "split=all", "lengths=[8]", "attention=none")
    assert "Perplexity by context length" in capsys.readouterr().out


def test_model_that_cannot_be_patched_is_evaluated_with_a_warning(
    make_config, mamba_folder, caplog
) -> None:
    tasks = ["perplexity", "context_gain"]
    table = evaluate(make_config(mamba_folder, lengths=[8, 16], tasks=tasks)).perplexity
    assert caplog.text.count("as it is, on padded rows") == 1
    assert table.rows[0].tokens == sum(len(text) for text in TEXTS)


def test_attention_that_changes_the_result_is_never_left_out(make_config) -> None:
    with pytest.raises(ValueError, match="attention"):
        evaluate(make_config(attention=AttentionConfig(name="no_such_attention")))


def test_held_out_documents_are_those_of_training(
    make_config, texts, model_folder, tmp_path
) -> None:
    settings = {"tokenizer": str(model_folder), "held_out_fraction": 0.5, "cache_dir": tmp_path}
    module = PackedDataModule(TextSource(files=(f"{texts}/*.txt",)), **settings)
    module.setup()
    expected = module.held_out_documents()
    documents = evaluation_documents(module.preparation, "held_out")
    assert 0 < len(documents) == len(expected) < len(TEXTS)
    for document, other in zip(documents, expected, strict=True):
        assert (document.name, document.document_id) == (other.name, other.document_id)
        assert document.input_ids.tolist() == other.input_ids.tolist()


@pytest.mark.parametrize("special_tokens", ["text", "token"])
def test_special_tokens_in_text_are_read_as_in_training(model_folder, tmp_path, special_tokens):
    (tmp_path / "0.txt").write_text("one<end>two")
    settings = {"cache_dir": tmp_path, "special_tokens": special_tokens, "held_out_fraction": 0.0}
    source = TextSource(files=(f"{tmp_path}/0.txt",))
    module = PackedDataModule(source, str(model_folder), **settings)
    (document,) = evaluation_documents(module.preparation, "all")
    assert len(document.input_ids) == (12 if special_tokens == "text" else 8)


def test_documents_that_were_set_aside(texts, model_folder, tmp_path) -> None:
    source = TextSource(files=(f"{texts}/0.txt",), held_out_files=(f"{texts}/1.txt",))
    module = PackedDataModule(source, str(model_folder), cache_dir=tmp_path)
    (document,) = evaluation_documents(module.preparation, "held_out")
    assert document.name.endswith("1.txt")
    assert len(document.input_ids) == len(TEXTS[1]) + 1


def test_only_the_longest_documents(make_config) -> None:
    table = evaluate(make_config(documents=1)).perplexity
    assert table.rows[0].tokens == len(TEXTS[0])


def test_loggers_get_metrics_table_and_plot(make_config, monkeypatch) -> None:
    calls = {}
    logger = SimpleNamespace(
        log_metrics=lambda metrics, step: calls.update(metrics=metrics),
        log_table=lambda key, columns, data: calls.update(columns=columns, data=data),
        log_image=lambda key, images: calls.update(images=images),
        finalize=lambda status: calls.update(status=status),
    )
    monkeypatch.setattr("lctrain.build.instantiate_all", lambda group, configs: {"mine": logger})
    evaluation = evaluate(make_config())
    table, paths = evaluation.perplexity, evaluation.paths
    assert calls["metrics"] == {f"perplexity_{row.length}": row.perplexity for row in table.rows}
    assert calls["columns"][:2] == ["length", "perplexity"]
    assert len(calls["data"]) == 2
    assert calls["images"] == [str(paths["perplexity png"])]
    assert calls["status"] == "success"


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_dtype_of_the_weights(dtype, model_folder) -> None:
    model = load_pretrained(PretrainedModelConfig(name_or_path=str(model_folder)), dtype)
    assert model.dtype == (torch.float64 if dtype == "auto" else getattr(torch, dtype))
    assert not model.training


def test_model_is_short_for_its_name() -> None:
    arguments = ["model=a/b", "data=text", "model.revision=main", "--multirun", "name=model=x"]
    assert name_the_model(arguments) == ["model.name_or_path=a/b", *arguments[1:]]


def test_device_is_found() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device("auto").type == expected
    assert pick_device("cpu") == torch.device("cpu")


def other_tokenizer(model_folder: Path, folder: Path) -> Path:
    """A tokenizer with the same tokens under other ids."""
    tokenizer = json.loads((model_folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = vocabulary["a"], vocabulary["b"]
    vocabulary |= {"a": b, "b": a}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(model_folder / "tokenizer_config.json", folder)
    return folder


def test_the_models_own_tokenizer_is_the_default_and_no_other_is_taken(
    make_config, model_folder, tmp_path
) -> None:
    by_default = evaluate(make_config(data={"tokenizer": None})).perplexity
    assert by_default == evaluate(make_config()).perplexity
    other = str(other_tokenizer(model_folder, tmp_path / "other"))
    with pytest.raises(ValueError, match=r"must be the model's own, got .*other"):
        evaluate(make_config(data={"tokenizer": other}))
    forced = PretrainedModelConfig(name_or_path=str(model_folder), allow_other_tokenizer=True)
    changed = evaluate(make_config(data={"tokenizer": other}, model=forced)).perplexity
    assert changed.rows[0].loss != by_default.rows[0].loss


def test_a_model_whose_tokenizer_has_no_end_token_is_evaluated(
    make_config, model_folder, tmp_path
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(model_folder, folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    del tokenizer["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = make_config(folder, tasks=["perplexity", "passkey"], window=64, lengths=[256])
    found = evaluate(replace(config, passkey=PasskeyConfig(keys_per_cell=1)))
    # each document is a token shorter
    assert found.perplexity.rows[0].tokens == sum(len(text) - 1 for text in TEXTS)
    assert found.passkey is not None


@pytest.mark.parametrize("methods", [[], ["plain", "ntk"]], ids=["one", "methods"])
def test_windows_begin_as_the_tokenizer_begins_a_text(
    make_config, model_folder, tmp_path, methods
) -> None:
    folder = tmp_path / "begun"
    shutil.copytree(model_folder, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    settings = {"data": {"tokenizer": None}, "methods": methods, "window": 64}
    every = evaluate(make_config(folder, **settings)).perplexity
    assert "every window begins with the begin token" in str(every)
    not_every = evaluate(make_config(folder, **settings, begin_token=False)).perplexity
    assert "windows that begin with the begin token: " in str(not_every)
    assert every != not_every
    with pytest.raises(ValueError, match="begin_token must be null or false"):
        evaluate(make_config(begin_token=True))


BAD_SETTINGS = {
    "length": ({"lengths": [1]}, "lengths must be at least 2, got 1"),
    "no-length": ({"lengths": []}, "lengths must name at least one"),
    "max-tokens": ({"max_tokens": 32}, "lengths must be at most max_tokens = 32, got 64"),
    "split": ({"split": "test"}, "split must be one of held_out, all, got 'test'"),
    "dtype": ({"dtype": "int8"}, "dtype must be one of auto, .* got 'int8'"),
    "device": ({"device": "abacus"}, "device must be one that this machine has, got 'abacus'"),
    "documents": ({"documents": 0}, "documents must be at least 1, got 0"),
    "no-tokenizer": ({"data": {"tokenizer": "./none"}}, r"tokenizer must be a folder or"),
    "no-file": ({"data": {"files": ("no/such/*.txt",)}}, "no/such"),
    "nothing-held-out": (
        {"split": "held_out", "data": {"held_out_fraction": 0.0}},
        r"data must hold out at least one document .* split=all",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_setting_is_an_error_that_names_it(change, message, make_config) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(make_config(**change))


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "a/b/c"])
def test_folder_that_does_not_exist_is_an_error(name, make_config) -> None:
    with pytest.raises(ValueError, match=f"got {name}, which does not exist"):
        evaluate(make_config(model=PretrainedModelConfig(name_or_path=name)))


def test_folder_without_a_model_is_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match="which cannot be loaded"):
        load_pretrained(PretrainedModelConfig(name_or_path=str(tmp_path)))


def test_command_line_without_a_model_is_an_error(run_main) -> None:
    with pytest.raises(ValueError, match="model must be given, got none"):
        run_main()


@pytest.mark.parametrize("override", ["lenghts=[8]", "lengths=[eight]", "data.no_such_key=1"])
def test_unknown_key_or_wrong_type_is_an_error_that_names_it(override, run_main) -> None:
    from hydra.errors import ConfigCompositionException

    with pytest.raises(ConfigCompositionException) as caught:
        run_main("model=x", override)
    key = override.split("=")[0].split(".")[-1]
    assert key in f"{caught.value} {caught.value.__cause__}"


def test_documents_can_be_cut(make_config) -> None:
    table = evaluate(make_config(document_tokens=50)).perplexity
    assert table.rows[0].tokens == sum(min(len(text), 49) for text in TEXTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": []}, r"tasks must be some of perplexity, .*, got \[\]"),
        ({"tasks": ["needles"]}, r"tasks must be some of perplexity, .*, got \['needles'\]"),
        ({"methods": ["pose"]}, "methods must be among plain, .* got 'pose'"),
        (
            {"passkey": PasskeyConfig(methods=["pose"])},
            "methods must be among plain, .* got 'pose'",
        ),
        ({"methods": ["plain"], "window": 1}, "window must be at least 2, got 1"),
        ({"tasks": ["context_gain"], "lengths": [8]}, "lengths must name at least two for context"),
        (
            {"tasks": ["sliding_perplexity"], "document_tokens": 9},
            "document_tokens must be at least the longest length, 64, for sliding_perplexity, got",
        ),
        ({"tasks": ["longppl"]}, "lengths must be above longppl.short_context . 1 = 4097, got 8"),
        (
            {"tasks": ["longppl"], "longppl": LongPerplexityConfig([64], None, "./none", 16, 4)},
            "longppl.evaluator must be a folder or a name .* got ./none, which does not exist",
        ),
        (
            {"tasks": ["needle"], "needle": NeedleConfig(lengths=[1])},
            "needle.lengths must be at least 2, got 1",
        ),
        (
            {"tasks": ["ruler"], "max_tokens": 99, "ruler": RulerConfig(lengths=[100])},
            "ruler.lengths must be at most max_tokens = 99, got 100",
        ),
        ({"tasks": ["harness"]}, "harness.tasks must name at least one task"),
        (
            {"tasks": ["ruler"], "ruler": RulerConfig(questions="none.jsonl")},
            "ruler.questions must be a file of JSON lines, got none.jsonl, which is not there",
        ),
    ],
)
def test_bad_tasks_and_methods_are_an_error_before_the_model_is_loaded(
    make_config, change, message, monkeypatch
) -> None:
    monkeypatch.setattr("lctrain.models.pretrained.load_pretrained", None)
    with pytest.raises(ValueError, match=message):
        evaluate(make_config(**change))
