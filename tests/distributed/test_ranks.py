"""Tests that a rank that fails ends the others, which would wait for it."""

import sys
import time
from pathlib import Path

import pytest


def test_a_rank_that_fails_ends_the_others(tmp_path):
    from tests.distributed.ranks import run_ranks

    with pytest.raises(AssertionError, match="rank 1: this one fails") as error:
        run_ranks("tests.distributed.test_ranks", 2, tmp_path)
    assert "rank 0" not in str(error.value)
    assert not (tmp_path / "ended").exists()


def main() -> None:
    """Fails on rank 1, for which rank 0 waits."""
    if sys.argv[1] == "1":
        sys.exit("this one fails")
    time.sleep(3600)
    Path(sys.argv[3], "ended").touch()
