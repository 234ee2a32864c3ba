"""Runs four rounds of tests.interrupt_runs: a kill, a signal, a full disk, a damaged file."""

import pytest

from tests import interrupt_runs


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_interrupted_runs_end_bit_equal(tmp_path, capsys):
    interrupt_runs.main(["--rounds", "4", "--folder", str(tmp_path / "runs")])
    assert capsys.readouterr().out.count(": bit-equal") == 4
