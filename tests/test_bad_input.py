"""Tests bad input on the command line: each case ends with its message, quickly and without torch.

`bad_input.txt` holds each case's command, arguments and the beginning of its message. All these
errors can be found without torch, and so within a second or two.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lctrain.failure import MOST_LINES
from tests.run_bad_input import CASES, cases

ROOT = Path(__file__).parents[1]


def check(part, folder):
    """Checks, in a process without torch, that every case ends with status 2 and its message."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("HYDRA_FULL_ERROR", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.run_bad_input", part],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["wrong"]
    assert max(found["lines"]) <= MOST_LINES
    assert len(found["lines"]) == len(cases(part))


def test_there_are_enough():
    assert len({(program, arguments) for program, arguments, _ in CASES}) >= 100


def test_some_bad_inputs(tmp_path):
    check("some", tmp_path)


@pytest.mark.slow
def test_other_bad_inputs(tmp_path):
    check("others", tmp_path)
