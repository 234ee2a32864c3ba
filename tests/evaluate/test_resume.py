"""Tests that a stopped evaluation goes on, and that finished ones are compared."""

import dataclasses

import numpy as np
import pytest

from lctrain.config import AttentionConfig, PasskeyConfig, PathsConfig
from lctrain.config.tasks import LongPerplexityConfig, NeedleConfig
from lctrain.data import TokenizedDocument
from lctrain.eval import Subject
from lctrain.eval.paired import compare_runs
from lctrain.eval.resume import open_cells
from lctrain.eval.run_task import Run
from lctrain.evaluate import evaluate


@pytest.fixture
def computed(monkeypatch) -> list[tuple[str, int]]:
    """Lists the cells that are computed; the third one fails while `fails` is set."""
    seen = []
    compute = Run._result

    def result(self, reading, length, advance):
        seen.append((self.task.name, length))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return compute(self, reading, length, advance)

    monkeypatch.setattr(Run, "_result", result)
    return seen


def test_a_stopped_evaluation_goes_on_with_the_cells_that_are_missing(
    make_config, tmp_path, computed
) -> None:
    settings = {
        "tasks": ["perplexity", "passkey"],
        "passkey": PasskeyConfig(lengths=[200, 256], depths=[0.5], keys_per_cell=1),
        "window": 64,
        "paths": PathsConfig(output_dir=str(tmp_path / "out")),
    }
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        evaluate(make_config(**settings))
    with pytest.raises(ValueError, match=r"finished cells. Go on with it by resume=.*out, or"):
        evaluate(make_config(**settings))
    assert not (tmp_path / "out" / "report.html").exists()
    resumed = evaluate(make_config(**settings, resume=str(tmp_path / "out")))
    assert computed[2:] == [("passkey", 200), ("passkey", 200), ("passkey", 256)]
    whole = evaluate(
        make_config(**settings | {"paths": PathsConfig(output_dir=str(tmp_path / "w"))})
    )
    assert resumed.perplexity == whole.perplexity
    assert resumed.passkey.as_dicts() == whole.passkey.as_dicts()
    assert resumed.paths["report"].exists()


def test_other_settings_are_refused_before_the_model_is_loaded(
    make_config, tmp_path, monkeypatch
) -> None:
    settings = {"paths": PathsConfig(output_dir=str(tmp_path))}
    evaluate(make_config(**settings))
    options = (tmp_path / "config.yaml").read_text()
    loaded: list[str] = []

    def load(*arguments, **settings):
        loaded.append("model")
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lctrain.models.pretrained.load_pretrained", load)
    settings |= {"resume": "x", "attention": AttentionConfig(name="dual_chunk")}
    with pytest.raises(ValueError, match="resume must name an evaluation with the same settings"):
        evaluate(make_config(**settings))
    assert not loaded
    assert (tmp_path / "config.yaml").read_text() == options
    assert not list(tmp_path.glob("config_*.yaml"))


def test_the_remedy_of_a_failed_task_may_be_used_by_the_resumed_evaluation(
    make_config, tmp_path
) -> None:
    """No token is a key token with a gain of 50; with one of -50 every token is."""

    def config(gain, **changes):
        return make_config(
            tasks=["perplexity", "longppl"],
            lengths=[100, 150],
            longppl=LongPerplexityConfig(short_context=8, step=4, gain=gain, loss=50.0),
            paths=PathsConfig(output_dir=str(tmp_path)),
            **changes,
        )

    with pytest.raises(ValueError, match=r"Lower longppl.gain.*start a new one then"):
        evaluate(config(50.0))
    tables = evaluate(config(-50.0, resume="x")).tables
    assert [row.length for row in tables["longppl"].rows] == [100, 150]
    with pytest.raises(ValueError, match=r"with longppl.gain=-50.0 instead of -40.0. Restore it"):
        evaluate(config(-40.0, resume="x"))


def test_other_weights_or_texts_are_not_mixed(make_config, make_llama, tmp_path) -> None:
    config = make_config(paths=PathsConfig(output_dir=str(tmp_path)))
    documents = [TokenizedDocument("d", np.array([1, 2, 3]), 0)]
    open_cells(config, Subject(make_llama(), documents=documents))
    again = dataclasses.replace(config, resume=str(tmp_path))
    open_cells(again, Subject(make_llama(), documents=documents))
    other = make_llama()
    other.lm_head.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="with hash of the weights="):
        open_cells(again, Subject(other, documents=documents))
    other = make_llama()
    other.config.rms_norm_eps *= 2
    with pytest.raises(ValueError, match="with hash of the weights="):
        open_cells(again, Subject(other, documents=documents))
    documents = [TokenizedDocument("d", np.array([1, 2, 4]), 0)]
    with pytest.raises(ValueError, match="with hash of the documents="):
        open_cells(again, Subject(make_llama(), documents=documents))


def test_every_task_can_be_compared(make_config, tmp_path) -> None:
    tasks = ["perplexity", "sliding_perplexity", "context_gain", "longppl", "needle", "passkey"]
    own = {"lengths": [200], "depths": [0.5]}
    settings = {
        "tasks": tasks,
        "lengths": [150, 200],
        "longppl": LongPerplexityConfig(short_context=8, step=4, gain=-50.0, loss=50.0),
        "needle": NeedleConfig(needles=1, **own),
        "passkey": PasskeyConfig(keys_per_cell=1, **own),
        "paths": PathsConfig(output_dir=str(tmp_path / "out")),
    }
    evaluate(make_config(**settings))
    rows = compare_runs([tmp_path / "out"] * 2).rows
    assert list(dict.fromkeys(row.task for row in rows)) == tasks
    gained = [row for row in rows if row.task == "context_gain"]
    assert [(row.measure.name, row.length) for row in gained] == [("loss", 150), ("loss", 200)]


def test_the_command_resumes_and_compares(run_main, model_folder, tmp_path, capsys) -> None:
    arguments = [f"model={model_folder}", "split=all", "lengths=[8,32]", "name=mine"]
    run_main(*arguments)
    (first,) = (tmp_path / "outputs" / "mine").iterdir()
    (first / "report.html").unlink()
    run_main(*arguments, "resume=last")
    (same,) = (tmp_path / "outputs" / "mine").iterdir()
    assert (same / "report.html").exists()
    capsys.readouterr()
    run_main(f"compare=[{first},{same}]", "name=compared")
    assert "perplexity" in capsys.readouterr().out
    (folder,) = (tmp_path / "outputs" / "compared").iterdir()
    names = {file.name for file in folder.iterdir()}
    assert names >= {"comparison.csv", "comparison.json", "report.html"}


def test_lengths_beyond_the_positions_are_a_warning_with_the_remedy(
    make_config, small_window_folder, caplog
) -> None:
    tasks = ["perplexity", "context_gain"]
    evaluate(make_config(small_window_folder, lengths=[8, 64], tasks=tasks))
    found = [message for message in caplog.messages if "positions of the model" in message]
    assert len(found) == 1  # for all tasks
    assert "at most the 16 positions of the model, got 64 for perplexity, 64 for" in found[0]
    assert "Compare methods that read beyond them, with methods=[plain,yarn," in found[0]
    caplog.clear()
    evaluate(make_config(small_window_folder, lengths=[8, 64], methods=["yarn"]))
    evaluate(make_config(small_window_folder, lengths=[8, 16]))
    assert "positions" not in caplog.text
