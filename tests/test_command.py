"""Tests the commands: messages, exit status, help, and a configuration given as a file."""

import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lctrain import evaluate, train
from lctrain.command import options_first, overrides_of
from lctrain.composition import compose, known_keys
from lctrain.failure import BUG_STATUS, EXPECTED_STATUS, MOST_LINES, explain
from lctrain.help import attribute_docs, describe, pasteable
from lctrain.schemas import SCHEMAS


@pytest.fixture
def fail(monkeypatch, capsys, tmp_path):
    """Returns fail(command, *arguments), which runs a command and returns (status, stderr)."""

    def run(command, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr(sys, "argv", [command.COMMAND.program, *arguments])
        with pytest.raises(SystemExit) as stop:
            command.main()
        return stop.value.code, capsys.readouterr().err

    return run


def test_an_expected_error_is_its_message(fail):
    status, printed = fail(train, "trainer.max_stepz=4")
    assert status == EXPECTED_STATUS
    assert printed.splitlines()[0] == (
        "lctrain-train: trainer.max_stepz must be a key of the configuration, got one that it does "
        "not have. Did you mean trainer.max_steps?"
    )
    assert len(printed.splitlines()) <= MOST_LINES


def test_the_default_cache_must_be_writable(fail, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("LCTRAIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    status, printed = fail(train)
    assert status == EXPECTED_STATUS
    assert f"data.cache_dir must be a folder that can be written, got {tmp_path}/file/lc" in printed


def test_a_bug_keeps_its_traceback(fail, monkeypatch):
    def broken(config):
        return int("no number")

    monkeypatch.setattr(train, "train", broken)
    status, printed = fail(train)
    assert status == BUG_STATUS
    assert "Traceback" in printed
    assert "ValueError: invalid literal for int()" in printed


def test_full_error_asks_for_the_traceback(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["lctrain-train", "model=hf"])
    with pytest.raises(ValueError, match=r"model\.name_or_path must be given"):
        train.main()


def test_other_ranks_print_one_line_and_torchrun_gets_the_message(fail, monkeypatch, tmp_path):
    import json

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    status, printed = fail(train, "model=hf")
    assert status == EXPECTED_STATUS
    assert printed.startswith("lctrain-train (rank 1): model.name_or_path must be given")
    assert len(printed.splitlines()) == 1
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told["message"].startswith("model.name_or_path must be given")
    assert told["extraInfo"]["py_callstack"] == told["message"]


def raised(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_what_is_expected():
    from lctrain.config import OptimConfig

    assert explain(raised(lambda: OptimConfig(learning_rate=-1.0))).startswith(
        "optim.learning_rate"
    )
    assert explain(raised(lambda: Path("/no/such/file").read_text())).startswith(
        "/no/such/file: No such file"
    )
    renamed = raised(lambda: Path("/no").rename("/no/such/file"))
    assert explain(renamed).startswith("/no/such/file: ")
    assert explain(raised(lambda: [][0])) is None
    assert explain(raised(lambda: int("x"))) is None
    killed = RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
    assert explain(killed).startswith(
        "a worker process that builds batches ended by Killed. Memory"
    )


class Rows:
    """A dataset whose rows cannot be read."""

    def __init__(self, function):
        self.function = function

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.function()


def ours():
    from lctrain.config import OptimConfig

    OptimConfig(learning_rate=-1.0)


def bug():
    return int("x")


def test_errors_of_worker_processes():
    import torch

    for function, expected in ((ours, True), (bug, False)):
        loader = torch.utils.data.DataLoader(Rows(function), num_workers=1)
        error = raised(lambda loader=loader: list(loader))
        message = explain(error)
        assert (message is not None) == expected
        if expected:
            assert message.startswith("optim.learning_rate must be above 0, got -1.0.")
            assert message.endswith("(raised in worker process 0)")
            assert len(message.splitlines()) == 1


@pytest.mark.parametrize("command", [train, evaluate], ids=["train", "eval"])
def test_help_lists_every_key_with_its_meaning(command):
    overrides = ["model.name_or_path=x"] if command is evaluate else []
    text = describe(command.COMMAND, overrides)
    assert text.startswith(command.COMMAND.program)
    assert "_schema" not in text
    assert "_target_" not in text.replace("optim._target_", "")
    listed = {line.strip().partition("=")[0] for line in text.splitlines() if line[2:3].strip()}
    for key in ("data.held_out_fraction", "attention.name", "paths.root", "logger.csv.save_dir"):
        assert key in listed
    lines = text.splitlines()
    for i, line in enumerate(lines):
        key = line.strip().partition("=")[0]
        if "=" in line and "." in key and not key.startswith(("lctrain", "model.config")):
            assert lines[i + 1].startswith("      "), f"{key} has no meaning in its schema"


def test_help_of_the_evaluation_lists_what_it_takes():
    text = describe(evaluate.COMMAND, [])
    for absent in ("passkey_fraction", "trainer", "callbacks", "optim", "llama_5m", "gradient_"):
        assert absent not in text
    for key in ("dropout", "deterministic", "fused"):  # of training
        assert f"attention.{key}=" not in text
    assert "passkey.keys_per_cell=20" in text
    assert "Raises:" not in text


def test_help_follows_the_choices():
    text = describe(train.COMMAND, ["data=jsonl", "attention=none"])
    assert "data.field=text" in text
    assert "*jsonl" in text
    assert "attention.name" not in text


def test_every_attribute_of_a_schema_is_described():
    from dataclasses import fields

    for name, schema in SCHEMAS.items():
        described = attribute_docs(schema)
        missing = [f.name for f in fields(schema) if f.name not in described]
        assert not [m for m in missing if m != "_target_"], (name, missing)


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        (train, []),
        (train, ["experiment=llama_100m_32k", "callbacks.isolation=null", "logger=wandb"]),
        (train, ["data=jsonl", "data.files=[a b.jsonl]", "attention=none"]),
        (evaluate, ["model.name_or_path=x", "lengths=[64,128]"]),
    ],
)
def test_the_printed_configuration_composes_to_itself(command, overrides, tmp_path):
    text = pasteable(command.COMMAND, overrides)
    (tmp_path / "my.yaml").write_text(text)
    options = ["--config-dir", str(tmp_path), "--config-name", "my", "--cfg", "job"]
    again = subprocess.run(
        [sys.executable, "-m", command.__name__, *options],
        capture_output=True,
        text=True,
        check=True,
    )
    printed = OmegaConf.load(StringIO(again.stdout))
    assert printed == compose(command.COMMAND.config_name, overrides)


def test_keys_that_there_are():
    keys = known_keys("train", ["data=text", "data.nonsense=1", "nonsense=1"])
    assert {"trainer.max_steps", "data", "data.files", "data=jsonl:data.field"} <= set(keys)
    assert "data=text:data.files" not in keys


def test_options_are_no_overrides():
    assert overrides_of(["a=1", "--cfg", "job", "-m", "~b", "--config-dir", "x"]) == ["a=1", "~b"]


def test_options_may_stand_anywhere():
    given = ["debug=fast", "--multirun", "seed=0,1", "-cd", "folder", "name=x"]
    assert options_first(given) == [
        "--multirun",
        "-cd",
        "folder",
        "debug=fast",
        "seed=0,1",
        "name=x",
    ]
    assert options_first(["--cfg", "job", "seed=1"]) == ["--cfg", "job", "seed=1"]


def test_an_option_between_arguments_is_taken(fail):
    status, printed = fail(train, "seed=1", "--multirun", "trainer.max_stepz=4")
    assert status == EXPECTED_STATUS
    assert "trainer.max_stepz must be a key of the configuration" in printed.splitlines()[0]
