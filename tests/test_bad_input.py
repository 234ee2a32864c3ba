"""Bad input from the command line, many in one process: each is its message, at once.

`bad_input.txt` holds command, arguments and the beginning of the message of each case.
"""

import sys
from pathlib import Path

import pytest

from lctrain import evaluate, train
from lctrain.failure import EXPECTED_STATUS, MOST_LINES

COMMANDS = {"lctrain-train": train, "lctrain-eval": evaluate}
LINES = (Path(__file__).parent / "bad_input.txt").read_text().splitlines()
CASES = [tuple(part.strip() for part in line.split(" | ")) for line in LINES[1:]]
HEAVY = ("torch", "lightning", "transformers", "datasets")
PROBE = """
import sys
from lctrain.train import main
sys.argv[1:] = {arguments}
try:
    main()
except SystemExit as stop:
    print(stop.code, [name for name in {heavy} if name in sys.modules])
"""


def check(cases, monkeypatch, tmp_path, capsys):
    """Every case ends with its message, and nothing runs."""

    def run(config):
        raise AssertionError("bad input was run")

    monkeypatch.setattr(train, "train", run)
    monkeypatch.setattr(evaluate, "evaluate", run)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    wrong = []
    for program, arguments, message in cases:
        monkeypatch.setattr(sys, "argv", [program, *filter(None, arguments.split(" ; "))])
        with pytest.raises(SystemExit) as stop:
            COMMANDS[program].main()
        printed = capsys.readouterr().err.splitlines()
        expected = f"{program}: {message}"
        if stop.value.code != EXPECTED_STATUS or not printed[0].startswith(expected):
            wrong.append((arguments, stop.value.code, printed[0]))
        elif len(printed) > MOST_LINES:
            wrong.append((arguments, f"{len(printed)} lines"))
    assert not wrong


def test_there_are_enough():
    assert len({(program, arguments) for program, arguments, _ in CASES}) >= 100


def test_some_bad_inputs(monkeypatch, tmp_path, capsys):
    check(CASES[::9], monkeypatch, tmp_path, capsys)


@pytest.mark.slow
def test_all_bad_inputs_in_one_process(monkeypatch, tmp_path, capsys):
    check(CASES, monkeypatch, tmp_path, capsys)


def test_nothing_heavy_loads_for_a_bad_value(tmp_path):
    import subprocess

    for bad in ("trainer.max_stepz=1", "data.max_tokens=1", "ckpt_path=none.ckpt"):
        code = PROBE.format(arguments=[bad], heavy=HEAVY)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stdout.strip() == "2 []", done.stderr
