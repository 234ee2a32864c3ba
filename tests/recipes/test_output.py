"""Tests that a recipe stops with a short message if its output folder holds an earlier run."""

import os
import subprocess
import sys

import pytest

from lctrain.failure import EXPECTED_STATUS, MOST_LINES
from lctrain.recipes.differential.__main__ import main as differential
from lctrain.recipes.dual_chunk_extension.__main__ import FOLDERS
from lctrain.recipes.dual_chunk_extension.__main__ import main as extension
from lctrain.recipes.output import refuse_earlier_runs


def earlier(folder):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")


@pytest.mark.parametrize("stage", FOLDERS)
def test_no_stage_of_the_extension_runs_twice(tmp_path, stage):
    earlier(tmp_path / FOLDERS[stage][-1])
    with pytest.raises(ValueError, match=rf"stage {stage} has not run, got .*Choose another"):
        extension(["--output", str(tmp_path)])


def test_no_run_of_the_comparison_is_trained_twice(tmp_path):
    earlier(tmp_path / "runs" / "v1_2")
    with pytest.raises(ValueError, match=r"stage train has not run, got .*v1_2, which holds"):
        differential(["--output", str(tmp_path), "--scale", "tiny"])
    refuse_earlier_runs("train", [tmp_path / "runs" / "v1_0"])


def test_the_message_is_short(tmp_path):
    earlier(tmp_path / "train")
    program = "lctrain.recipes.dual_chunk_extension"
    environment = {name: text for name, text in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    done = subprocess.run(
        [sys.executable, "-m", program, "--output", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == EXPECTED_STATUS
    assert done.stderr.startswith(f"python -m {program}: --output must be a folder in which")
    assert len(done.stderr.splitlines()) <= MOST_LINES
